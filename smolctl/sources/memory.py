"""Memory for weights, which are read for every token."""

from __future__ import annotations

import math
import mmap
import threading
from typing import Any

import numpy as np

from smolctl.sources.arrays import Array

CHUNK_BYTES = 32 << 20
LINE_BYTES = 64  # of a CPU's cache line, to which arrays are aligned
PAGE_BYTES = 2 << 20  # a huge page

_lock = threading.Lock()
_rest: Array = np.empty(0, np.uint8)  # the unused rest of the newest chunk


def weight_array(shape: tuple[int, ...], dtype: np.dtype[Any] | type[np.generic]) -> Array:
    """An uninitialized array next to other such arrays, in huge pages if the system has them.

    The CPU then translates fewer addresses while it reads a network's weights, which are stored one after the
    other: decoding SmolLM2-135M with 4 bits takes 1.1 to 1.2 times less CPU time than with separate arrays
    (Zen 4). NumPy itself requests huge pages, but only for arrays of at least 4 MB. Each array of a chunk
    keeps the whole chunk alive, which is freed with the last of them.
    """
    global _rest
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > CHUNK_BYTES // 2 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(shape, dtype)
    with _lock:
        if size > len(_rest):
            pages = mmap.mmap(-1, CHUNK_BYTES + PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
            chunk = np.frombuffer(pages, np.uint8)
            _rest = chunk[-chunk.ctypes.data % PAGE_BYTES :][:CHUNK_BYTES]
        taken, _rest = _rest[:size], _rest[size + -size % LINE_BYTES :]
    return taken.view(dtype).reshape(shape)


def weight_copy(array: Array) -> Array:
    """A copy of an array with any strides: see `weight_array`."""
    copied = weight_array(array.shape, array.dtype)
    copied[...] = array
    return copied
