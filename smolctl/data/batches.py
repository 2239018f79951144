"""Steps of a run as batches of tokens, read from the memory-mapped shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smolctl.data.order import window_count, windows_of_samples
from smolctl.data.shards import TokenStream
from smolctl.errors import InputError


@dataclass(frozen=True)
class StepDataset(Dataset[Tensor]):
    """Item s is this device's share of step s: tokens (batch_size / world_size, sequence_length + 1).

    A run that is resumed with another batch size goes on behind the samples that it has seen.
    """

    stream: TokenStream
    sequence_length: int
    batch_size: int  # over all devices
    seed: int
    rank: int = 0
    world_size: int = 1
    first_step: int = 0
    first_sample: int = 0  # of the run, that step `first_step` begins with

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise InputError(
                f"train.batch_size {self.batch_size} does not divide by {self.world_size} devices",
                "Choose a batch_size that is a multiple of the number of devices.",
            )

    def samples_before(self, step: int) -> int:
        """Samples that the run has seen before a step."""
        return self.first_sample + (step - self.first_step) * self.batch_size

    def windows(self, step: int) -> list[int]:
        """Window numbers of this device's share of a step."""
        count = window_count(len(self.stream), self.sequence_length)
        windows = windows_of_samples(self.samples_before(step), self.batch_size, count, self.seed)
        share = self.batch_size // self.world_size
        return [int(window) for window in windows[self.rank * share : (self.rank + 1) * share]]

    def __getitem__(self, step: int) -> Tensor:
        length = self.sequence_length
        rows = [self.stream.read(window * length, length + 1) for window in self.windows(step)]
        return torch.from_numpy(np.stack(rows))


class StepLoader:
    """Batches of the steps from `start` to `stop`.

    Its length is `stop`, not what is left: Lightning counts the steps of the whole run, also after a
    resume. The order does not depend on `workers`.
    """

    def __init__(self, dataset: StepDataset, start: int, stop: int, workers: int = 0) -> None:
        self.dataset = dataset
        self.start = start
        self.stop = stop
        self.workers = workers

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[Tensor]:
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=range(self.start, self.stop),
            num_workers=self.workers,
            # A generator of its own: a DataLoader otherwise draws from the global one, which training uses.
            generator=torch.Generator().manual_seed(0),
        )
        return iter(loader)


def validation_batches(
    stream: TokenStream, sequence_length: int, batch_size: int, limit: int
) -> Iterator[Tensor]:
    """At most `limit` batches (batch_size or fewer, sequence_length + 1), the same ones every time.

    The windows are spread evenly over the held-out tokens.
    """
    count = window_count(len(stream), sequence_length)
    wanted = min(count, limit * batch_size)
    windows = np.linspace(0, count - 1, wanted).astype(np.int64) if wanted else np.empty(0, np.int64)
    for first in range(0, wanted, batch_size):
        rows = [
            stream.read(int(window) * sequence_length, sequence_length + 1)
            for window in windows[first : first + batch_size]
        ]
        yield torch.from_numpy(np.stack(rows))
