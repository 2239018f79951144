"""Likelihoods of given tokens after others, for many at once; common prefixes are processed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from smolctl.arithmetic import kv_cache_bytes_per_token
from smolctl.generation.engine import Cache, Engine, Logits
from smolctl.generation.sampling import NotFiniteError
from smolctl.generation.slots import common_prefix

Ids = tuple[int, ...]

MOST_SEQUENCES = 32  # in the cache at the same time: several items with their answers fill the matmuls
MOST_CACHE = 512 << 20  # bytes of the cache, if it holds more than one sequence
# Minimum tokens that must be saved before a common prefix is processed in a call of its own, which reads the
# weights once more and takes as long as a dozen tokens.
WORTH = 16
AT_ONCE = 256  # tokens whose logits are in memory: 50 MB for 49,152 entries


@dataclass(frozen=True)
class Target:
    """Tokens whose probability is requested.

    Args:
        inputs: ids of the model's input, at least as many as targets.
        targets: one or more ids: the last one follows all inputs, the one before it all but the last input,
            ….
    """

    inputs: Ids
    targets: Ids

    @property
    def first(self) -> int:
        """The index in `inputs` of the token before the first target."""
        return len(self.inputs) - len(self.targets)


@dataclass(frozen=True)
class Likelihood:
    """The joint likelihood of the targets."""

    nats: float  # log-probability
    is_greedy: bool  # whether each target is the likeliest token at its place


def sequences_that_fit(engine: Engine, length: int) -> int:
    """How many sequences of this many tokens the cache holds at the same time: a power of two, at least
    one.
    """
    fitting = MOST_CACHE // (kv_cache_bytes_per_token(engine.config) * length)
    return 1 << max(1, min(MOST_SEQUENCES, fitting)).bit_length() - 1


def likelihoods(
    engine: Engine, asked: Sequence[Target], on_read: Callable[[int], None] = lambda _done: None
) -> list[Likelihood]:
    """The likelihood of each target, in the order of `asked`.

    The inputs are sorted, so that those with a common prefix are adjacent, and are processed in batches:
    first the prefix that all of a batch share, then those that fewer share, and finally what each has alone.
    What the next batch shares with the last sequence stays in the cache.

    Args:
        engine: the model.
        asked: none has more inputs than the model has positions.
        on_read: called with the number of finished targets.

    Raises:
        InputError: the model's output is not finite.
    """
    owners: dict[Ids, list[int]] = {}
    for number, one in enumerate(asked):
        owners.setdefault(one.inputs, []).append(number)
    found = _Found(np.zeros(len(asked)), np.ones(len(asked), bool))
    before: _Batch | None = None
    done = 0
    for inputs in _neighbours(engine, sorted(owners)):
        longest = max(map(len, inputs))
        cache = before.cache if before is not None else None
        if cache is None or len(inputs) > len(cache.lengths) or not longest <= cache.capacity <= 2 * longest:
            room = min(longest + longest // 4, engine.config.max_position_embeddings)
            cache, before = engine.allocate(sequences_that_fit(engine, longest), room), None
        targets = [[(number, asked[number]) for number in owners[ids]] for ids in inputs]
        batch = _Batch(engine, cache, inputs, targets, found)
        batch.read(before)
        before = batch
        done += sum(map(len, targets))
        on_read(done)
    return [Likelihood(*one) for one in zip(found.nats.tolist(), found.is_greedy.tolist(), strict=True)]


def _neighbours(engine: Engine, inputs: Sequence[Ids]) -> Iterator[list[Ids]]:
    """Those that are in the cache at the same time."""
    batch: list[Ids] = []
    longest = 0
    for ids in inputs:
        longest = max(longest, len(ids))
        if batch and len(batch) >= sequences_that_fit(engine, longest):
            yield batch
            batch, longest = [], len(ids)
        batch.append(ids)
    if batch:
        yield batch


@dataclass(frozen=True)
class _Found:
    """The result so far for each target, (N,): the sum over its tokens, and whether all are likeliest."""

    nats: NDArray[np.float64]
    is_greedy: NDArray[np.bool_]

    def add(self, logits: Logits, rows: list[int], numbers: list[int], tokens: list[int]) -> None:
        """Add tokens (M,) of the targets with these numbers, predicted by these rows of logits (R, V)."""
        values, row, token = torch.from_numpy(logits), torch.tensor(rows), torch.tensor(tokens)
        normalizers = values.logsumexp(-1)
        if not normalizers.isfinite().all():
            raise NotFiniteError
        nats = values[row, token].double() - normalizers[row].double()
        np.add.at(self.nats, numbers, nats.numpy())
        np.logical_and.at(self.is_greedy, numbers, (values.argmax(-1)[row] == token).numpy())


@dataclass(frozen=True)
class _Stretch:
    """Inputs `low` to `high` (exclusive), which share their first `stop` tokens.

    The first of them processes the tokens that its sequence does not have yet.
    """

    low: int
    high: int
    stop: int


@dataclass(frozen=True)
class _Batch:
    """Sorted inputs, each with the cache sequence of the same number, and their numbered targets."""

    engine: Engine
    cache: Cache
    inputs: Sequence[Ids]
    targets: Sequence[Sequence[tuple[int, Target]]]
    found: _Found

    def read(self, before: _Batch | None) -> None:
        """Process all inputs. The previous batch used the same cache."""
        kept = self._kept(before.inputs[-1]) if before is not None else 0
        if before is not None and len(before.inputs) > 1:
            self.cache.copy(len(before.inputs) - 1, 0)
        for sequence in range(len(self.cache.lengths)):
            self.cache.truncate(sequence, 0 if sequence else kept)
        wave = self._unread(0, len(self.inputs))
        while wave:
            self._forward(wave)
            wave = [part for one in wave for part in self._parts(one)]

    @cached_property
    def _shared(self) -> list[int]:
        """For each input, how many tokens it shares with the start of the one before it; 0 for the first."""
        return [0, *(common_prefix(one, other) for one, other in pairwise(self.inputs))]

    def _kept(self, last: Ids) -> int:
        """How many tokens of the last processed inputs the first sequence can reuse."""
        kept = common_prefix(last, self.inputs[0])
        within = len(self.inputs[0])  # tokens that all inputs up to here share
        for targets, shared in zip(self.targets, [within, *self._shared[1:]], strict=True):
            within = min(within, shared)
            first = min(target.first for _, target in targets)
            if first < within:  # its prediction still has to be computed
                kept = min(kept, first)
        return kept

    def _unread(self, low: int, high: int) -> list[_Stretch]:
        """What to process next for some adjacent inputs; the first one's sequence already has a common
        prefix.
        """
        held = self.cache.lengths[low]
        stop = min(self._shared[low + 1 : high], default=len(self.inputs[low]))
        alone = high - low == 1
        if held < stop and (alone or (high - low - 1) * (stop - held) >= WORTH):
            return [_Stretch(low, high, stop)]
        return [] if alone else self._parts(_Stretch(low, high, stop))

    def _parts(self, stretch: _Stretch) -> list[_Stretch]:
        """What to process after a stretch, grouped by common continuation; each part starts with the first
        one's tokens.
        """
        ends = (n for n in range(stretch.low + 1, stretch.high) if self._shared[n] == stretch.stop)
        starts = [stretch.low, *ends]
        for start in starts[1:]:
            self.cache.copy(stretch.low, start)
            self.cache.truncate(start, stretch.stop)
        pairs = pairwise([*starts, stretch.high])
        return [part for low, high in pairs for part in self._unread(low, high)] if starts[1:] else []

    def _forward(self, wave: Sequence[_Stretch]) -> None:
        """Process stretches in the order of their sequences, and score the targets they predict."""
        leads: dict[int, Ids] = {}
        asked: list[tuple[_Stretch, int]] = []  # with a place whose logits are requested
        for one in wave:
            first = min(target.first for _, target in self._owners(one))
            first = min(max(first, self.cache.lengths[one.low]), one.stop)
            leads[one.low] = self.inputs[one.low][self.cache.lengths[one.low] : first]
            asked += [(one, place) for place in range(first, one.stop)]
        if any(leads.values()):
            self._call(leads)
        for start in range(0, len(asked), AT_ONCE):
            self._score(asked[start : start + AT_ONCE])

    def _score(self, asked: Sequence[tuple[_Stretch, int]]) -> None:
        """Process the token at each place, and score the targets that follow it."""
        read: dict[int, list[int]] = {}
        rows, numbers, followers = [], [], []
        for row, (one, place) in enumerate(asked):
            read.setdefault(one.low, []).append(self.inputs[one.low][place])
            for number, target in self._owners(one):
                if target.first <= place < len(target.inputs):
                    rows.append(row)
                    numbers.append(number)
                    followers.append(target.targets[place - target.first])
        self.found.add(self._call(read, every=True), rows, numbers, followers)

    def _owners(self, stretch: _Stretch) -> Iterator[tuple[int, Target]]:
        return (owner for targets in self.targets[stretch.low : stretch.high] for owner in targets)

    def _call(self, tokens: Mapping[int, Sequence[int]], every: bool = False) -> Logits:
        lists = [tokens.get(number, ()) for number in range(len(self.cache.lengths))]
        return self.engine.forward(lists, self.cache, every)
