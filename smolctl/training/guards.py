"""Turns failures of the machine into helpful errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from smolctl.errors import SmolError


class NonFiniteError(SmolError):
    """The loss or the gradient is not finite; the weights were not changed."""


class MemoryShortageError(SmolError):
    """A step does not fit into memory."""


@contextmanager
def explaining_memory_errors(micro_batch_size: int) -> Iterator[None]:
    """Turn an allocation failure into an error that names the setting which avoids it.

    Raises:
        MemoryShortageError: instead of PyTorch's and Python's own errors.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The CPU's allocator raises a plain RuntimeError.
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        smaller = f"--micro-batch-size {max(1, micro_batch_size // 2)}"
        hint = (
            f"Try {smaller}: the batch and the result stay the same."
            if micro_batch_size > 1
            else "Lower data.sequence_length, or choose a smaller model."
        )
        raise MemoryShortageError(
            f"out of memory with {micro_batch_size} sequences at once; the checkpoints are untouched", hint
        ) from error
