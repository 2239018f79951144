"""Settings of the process that trains."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def prepare_process(deterministic: bool = True) -> None:
    """Configure the process: the allocator, the precision and the choice of kernels."""
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    if deterministic:  # on a GPU; for Lightning it is too late once the plan has computed
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # no choice of kernels by timing
    # PyTorch would fill uninitialized memory, for debugging.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next step, instead of returning it to the system.

    By default, every large tensor is mapped and unmapped again, and the system clears all its pages, which
    takes over a tenth of a step's time on a CPU (docs/benchmarks.md). Without glibc, this does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
