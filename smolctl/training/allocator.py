"""The C library's allocator, set for training."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step instead of giving it back to the system.

    By default every large tensor is mapped and unmapped anew, and the system clears every page of it:
    over a tenth of a step's time on a CPU (benchmarks/README.md). Elsewhere than on glibc it does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
