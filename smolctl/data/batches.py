"""The steps of a run as batches of tokens, read from the shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from smolctl.data.order import window_count
from smolctl.data.tokens.marks import CONTEXT, FIRST, IDS
from smolctl.data.tokens.mixture import Mixture, Window
from smolctl.errors import InputError


@dataclass(frozen=True)
class Sequences:
    """The inputs and targets of a network.

    Attributes:
        inputs: (B, T) ids.
        targets: (B, T) the id after each of them.
        trained: (B, T) whether the target counts; None: all of them do.
        documents: (B, T) number of the document or conversation of each input, counted in its sequence;
            None: attention crosses documents.
    """

    inputs: Tensor
    targets: Tensor
    trained: Tensor | None = None
    documents: Tensor | None = None

    @property
    def trained_tokens(self) -> Tensor | int:
        """Number of targets that count: (), or an int if all do."""
        return self.targets.numel() if self.trained is None else self.trained.sum()

    def counted(self, values: Tensor) -> Tensor:
        """Values (B, T) of the targets, with 0 for targets that do not count."""
        return values if self.trained is None else values * self.trained

    def split(self, size: int) -> Iterator[Sequences]:
        """Parts of at most `size` sequences."""
        for rows in torch.arange(len(self.inputs)).split(size):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            rest = (None if mask is None else mask[part] for mask in (self.trained, self.documents))
            yield Sequences(self.inputs[part], self.targets[part], *rest)


def text_sequences(tokens: Tensor, document_end: int | None = None) -> Sequences:
    """Inputs and targets of tokens (B, T + 1) without marks; `document_end` as in `sequences_of`."""
    inputs = tokens[:, :-1]
    ends = inputs == document_end if document_end is not None else None
    return Sequences(inputs, tokens[:, 1:], documents=None if ends is None else ends.cumsum(1) - ends.long())


def sequences_of(tokens: Tensor, document_end: int | None = None) -> Sequences:
    """Inputs and targets of a batch's tokens (B, T + 1), with or without marks.

    Args:
        tokens: any integers.
        document_end: for plain text, the token that ends a document, to which it belongs, and that limits
            attention; None: attention crosses documents.
    """
    if not bool((tokens >= FIRST).any()):
        return text_sequences(tokens, document_end)
    ids = tokens & IDS
    trained = (tokens[:, 1:] & CONTEXT) == 0
    return Sequences(ids[:, :-1], ids[:, 1:], trained, ((tokens[:, :-1] & FIRST) > 0).cumsum(1))


@dataclass(frozen=True)
class StepDataset(Dataset[Tensor]):
    """Item s is this device's share of step s: tokens (batch_size / world_size, sequence_length + 1).

    Samples are numbered through the whole run. Step `first_step` starts with sample `first_sample`: after a
    change of batch size, the run continues with the next unseen sample.
    """

    tokens: Mixture
    sequence_length: int
    batch_size: int  # over all devices
    seed: int
    rank: int = 0
    world_size: int = 1
    first_step: int = 0
    first_sample: int = 0
    document_end: int | None = None  # ends a document for attention; None: attention crosses documents

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise InputError(
                f"train.batch_size {self.batch_size} is not divisible by {self.world_size} devices",
                "Choose a batch_size that is a multiple of the number of devices.",
            )

    def samples_before(self, step: int) -> int:
        """Samples used before a step."""
        return self.first_sample + (step - self.first_step) * self.batch_size

    def windows(self, step: int) -> list[Window]:
        """Windows of this device's share of a step."""
        share = self.batch_size // self.world_size
        first = self.samples_before(step) + self.rank * share
        samples = np.arange(first, first + share, dtype=np.int64)
        return self.tokens.windows(samples, self.sequence_length, self.seed)

    def __getitem__(self, step: int) -> Tensor:
        rows = [self.tokens.read(window, self.sequence_length) for window in self.windows(step)]
        return torch.from_numpy(np.stack(rows))


class StepLoader:
    """Batches of the steps from `start` to `stop`.

    Its length is `stop`, not the number of remaining steps, because Lightning counts the steps of the whole
    run, also after a resume. The order does not depend on `workers`, which are threads that read ahead: they
    only copy memory, so processes would not be faster, and threads cannot be killed separately by a signal or
    a lack of shared memory.
    """

    def __init__(self, dataset: StepDataset, start: int, stop: int, workers: int = 0) -> None:
        self.dataset = dataset
        self.start = start
        self.stop = stop
        self.workers = workers

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[Tensor]:
        steps = iter(range(self.start, self.stop))
        if not self.workers:
            yield from map(self.dataset.__getitem__, steps)
            return
        with ThreadPoolExecutor(self.workers, "batches") as pool:
            batches = (pool.submit(self.dataset.__getitem__, step) for step in steps)
            ahead = deque(islice(batches, 2 * self.workers))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(islice(batches, 1))
                yield batch


def validation_batches(
    held_out: Mixture, sequence_length: int, batch_size: int, sequences: int
) -> Iterator[Tensor]:
    """Held-out sequences in batches (at most batch_size, sequence_length + 1), always the same ones.

    The choice does not depend on `batch_size`. Every source gives sequences in proportion to its share,
    spread evenly over its held-out tokens; fewer if it does not have enough tokens, and a single shorter
    sequence if they do not fill one.
    """
    for windows, length in _validation_windows(held_out, sequence_length, batch_size, sequences):
        yield torch.from_numpy(np.stack([held_out.read(window, length) for window in windows]))


def validation_documents(
    held_out: Mixture, sequence_length: int, batch_size: int, sequences: int, end_of_text: int
) -> Iterator[Tensor]:
    """The number of the document of each predicted token of `validation_batches`: (B, sequence_length) each.

    An end-of-text token belongs to the document that it ends.
    """
    ends = [part.tokens.places_of(end_of_text) for part in held_out.parts]
    firsts = np.cumsum([0, *(len(places) + 1 for places in ends)])  # number of each source's first document
    for windows, length in _validation_windows(held_out, sequence_length, batch_size, sequences):
        places = np.array([[window.start + 1] for window in windows]) + np.arange(length)
        source = windows[0].part
        yield torch.from_numpy(firsts[source] + np.searchsorted(ends[source], places))


def _validation_windows(
    held_out: Mixture, sequence_length: int, batch_size: int, sequences: int
) -> Iterator[tuple[list[Window], int]]:
    """The sequences of each batch, all from one source, and their length."""
    shares = sum(part.share for part in held_out.parts)
    for index, part in enumerate(held_out.parts):
        length = min(sequence_length, len(part.tokens) - 1)
        count = window_count(len(part.tokens), length)
        chosen = min(count, max(1, round(sequences * part.share / shares)))
        numbers = np.linspace(0, count - 1, chosen).astype(int)
        for first in range(0, chosen, batch_size):
            yield (
                [Window(index, int(number) * length) for number in numbers[first : first + batch_size]],
                length,
            )
