"""What the processes of one run tell each other. With a single process all of it costs nothing."""

from __future__ import annotations

import io
from typing import TypeVar

import torch.distributed

from smolctl.training.lightning import pl, rank_zero_only

T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this process keeps the records; known from the environment, before anything is set up.

    Lightning, torchrun and SLURM start the same command once for every device.
    """
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def gather(value: T, trainer: pl.Trainer) -> list[T]:
    """The values of all processes, in the order of their ranks, on each of them: tensors and plain data."""
    if trainer.world_size == 1:
        return [value]
    packed = io.BytesIO()
    torch.save(value, packed)  # all_gather_object itself fails on tensors of bytes in PyTorch 2.13
    received: list[bytes] = [b""] * trainer.world_size
    torch.distributed.all_gather_object(received, packed.getvalue())
    return [torch.load(io.BytesIO(content), weights_only=True) for content in received]


def from_main(value: T, trainer: pl.Trainer) -> T:
    """The main process's value on all of them."""
    return value if trainer.world_size == 1 else trainer.strategy.broadcast(value)
