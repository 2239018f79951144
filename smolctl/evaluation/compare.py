"""Which of several models predicts the same documents better, and whether the difference is more than
chance.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError, UsageError
from smolctl.evaluation.estimate import Estimate, resampled_estimate
from smolctl.evaluation.readings import BLOCK, Blocks, Reader, read_for_all, score
from smolctl.evaluation.texts import Text, choose_text
from smolctl.generation.load import load_model
from smolctl.inspection.differences import Difference
from smolctl.inspection.differences import compare as compare_sources
from smolctl.sources import open_weights
from smolctl.sources.base import ModelSource

LONGEST = 1_024  # maximum tokens per sequence, or fewer if a model has fewer positions
_LABELS = (*string.ascii_uppercase, *map(str, range(27, 1_000)))
SEEDS = ("train.seed", "data.seed")
# Settings of a run that do not affect what it learns.
INCIDENTAL = ("checkpoint.", "predictions.", "validation.", "trainer.loggers", "publish.", "data.workers")


@dataclass(frozen=True)
class CompareOptions:
    """Options of a call."""

    data: tuple[str, ...] = ()  # text to compare on; empty: held-out text
    bytes: int = 500_000  # maximum bytes of text
    context: int | None = None  # tokens per sequence; None: the shortest context of the models


@dataclass(frozen=True)
class Measure:
    """The score of one model, or of one recipe with several seeds."""

    label: str  # A, B, C
    models: tuple[str, ...]  # several: runs that differ only in their seeds
    seeds: tuple[int | None, ...]  # train.seed of each; None: not known
    bits_per_byte: Estimate  # the mean over the seeds; its interval covers documents and seeds
    of_each: tuple[float, ...]  # bits per byte of each run
    tokens: int  # number of tokens of the text in its tokenizer
    engine: str

    @property
    def broken(self) -> bool:
        """Whether a prediction was NaN or infinite."""
        return not math.isfinite(self.bits_per_byte.mean)

    @property
    def seed_deviation(self) -> float | None:
        """Standard deviation between the seeds, in bits per byte; None: there is only one seed."""
        return float(np.std(self.of_each, ddof=1)) if len(self.of_each) > 1 else None


@dataclass(frozen=True)
class Pair:
    """Two of them, compared on the same documents."""

    a: Measure
    b: Measure
    difference: Estimate  # a - b, in bits per byte: negative if a is better
    differences: tuple[Difference, ...]  # between their configs and recipes

    @property
    def better(self) -> Measure | None:
        """The one that is better beyond the interval; a model that predicts NaN never is."""
        if self.a.broken or self.b.broken:
            return None if self.a.broken and self.b.broken else self.b if self.a.broken else self.a
        margin = self.difference.margin
        if margin is None or not abs(self.difference.mean) > margin:
            return None
        return self.a if self.difference.mean < 0 else self.b

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        broken = " and ".join(one.label for one in (self.a, self.b) if one.broken)
        if broken:
            return f"{broken}: broken, predicts NaN or infinite values"
        gap, margin = abs(self.difference.mean), self.difference.margin
        assert margin is not None  # `compare` refuses text that is too short for an interval
        if self.better is None:
            if not margin:
                return f"{self.a.label} and {self.b.label} predict equally well: difference 0"
            return (
                f"no difference seen between {self.a.label} and {self.b.label}: {gap:.4f} ± {margin:.4f} "
                f"bits/byte; {self.difference.detectable:.4f} would be detected with a probability of 80 %"
            )
        other = self.b if self.better is self.a else self.a
        return f"{self.better.label} is better than {other.label} by {gap:.4f} ± {margin:.4f} bits/byte"


@dataclass(frozen=True)
class Comparison:
    """The results of a call."""

    text: Text
    context: int  # tokens per sequence
    observations: int  # number of resampled observations
    by_document: bool  # whether observations are documents, or parts of them
    measures: tuple[Measure, ...]
    pairs: tuple[Pair, ...]  # all pairs, in the order of the measures
    notes: tuple[str, ...]  # what the intervals do not cover

    @property
    def first_is_best(self) -> bool:
        """Whether the first is better than each of the others, beyond the intervals."""
        first = self.measures[0]
        return all(pair.better is first for pair in self.pairs if pair.a is first)


@dataclass(frozen=True)
class _Model(Reader):
    source: ModelSource

    @property
    def seed(self) -> int | None:
        return self.source.run.train.seed if self.source.run is not None else None

    @property
    def seeds(self) -> tuple[int, int] | None:
        run = self.source.run
        return None if run is None else (run.train.seed, run.data.seed)


def compare(
    names: Sequence[str],
    options: CompareOptions = CompareOptions(),
    note: Callable[[str], None] = lambda _text: None,
) -> Comparison:
    """Score every model on the same documents, with one model in memory at a time, and compare all pairs.

    Runs that differ only in their seeds count as one model if there are others to compare it with.

    Args:
        names: any MODEL with weights and a tokenizer, at least two.
        options: the text and how it is processed.
        note: called with each line of progress.

    Raises:
        SmolError: a model cannot be read, or there is not enough text that all of them can read.
    """
    if len(names) < 2:
        raise UsageError(
            "there is only one model, and nothing to compare it with", "Name two models or more."
        )
    models = [_open(name) for name in names]
    context = _context(models, options.context)
    text = choose_text([(one.source, one.tokenizer) for one in models], options.data, options.bytes, note)
    text, readings = read_for_all(text, models, note)
    blocks = Blocks.of(text)
    sizes = blocks.observed(blocks.sizes)
    if len(sizes) < 2:
        raise _too_little(text)
    scores, engines, tokens = [], [], []
    for model in models:
        own = readings[model.encoding]
        tokens.append(sum(int(one.is_scored.sum()) for one in own))
        note(f"scoring {model.name}: {tokens[-1]:,} tokens of the {text.name}")
        engine = load_model(model.name).engine
        lengths = None if text.is_chat else model.tokenizer.token_byte_lengths()
        scores.append(blocks.observed(score(engine, own, lengths, blocks, context)))
        engines.append(engine.name)
        del engine
    groups = _groups(models)
    amounts = [np.stack([scores[member] for member in members]) for members in groups]
    measures = [
        Measure(
            label,
            tuple(models[member].name for member in members),
            tuple(models[member].seed for member in members),
            resampled_estimate(amount, sizes),
            tuple((amount.sum(1) / sizes.sum()).tolist()),
            tokens[members[0]],
            engines[members[0]],
        )
        for label, members, amount in zip(_LABELS, groups, amounts, strict=False)
    ]
    pairs = tuple(
        Pair(
            measures[a],
            measures[b],
            resampled_estimate(amounts[a], sizes, amounts[b]),
            _differences(models[groups[a][0]], models[groups[b][0]], pooled=len(groups) < len(models)),
        )
        for a, b in combinations(range(len(groups)), 2)
    )
    return Comparison(
        text,
        context,
        len(sizes),
        blocks.by_document,
        tuple(measures),
        pairs,
        _notes(models, groups, blocks, text.is_chat),
    )


def _too_little(text: Text) -> InputError:
    what = "one conversation" if text.is_chat else f"{text.bytes:,} bytes in one document"
    more = "two conversations or more" if text.is_chat else f"two documents, or on more than {BLOCK:,} bytes"
    return InputError(
        f"{text.name}: {what}, which is too little for an interval",
        f"Compare on {more}: --data FILE, or a larger --bytes.",
    )


def _open(name: str) -> _Model:
    source = open_weights(name)
    return _Model(name, Tokenizer.from_files(source.require_tokenizer(), name), source)


def _context(models: Sequence[_Model], asked: int | None) -> int:
    """Tokens per sequence: the same for all, and at most the positions of each.

    For a run, at most the length that it was trained on, unless more is requested.
    """
    positions = {one.name: one.source.require_config().max_position_embeddings for one in models}
    name = min(positions, key=lambda one: positions[one])
    if asked is not None:
        if not 1 < asked <= positions[name]:
            raise UsageError(
                f"--context {asked}: {name} has {positions[name]:,} positions",
                f"Use 2 to {positions[name]:,}.",
            )
        return asked
    trained = [one.source.run.data.sequence_length for one in models if one.source.run is not None]
    return min(LONGEST, positions[name], *trained)


def _groups(models: Sequence[_Model]) -> list[list[int]]:
    """Groups of models, by number, that differ only in their seeds; single models if there would be only
    one group.
    """
    groups: list[list[int]] = []
    for number, model in enumerate(models):
        for group in groups:
            first = models[group[0]]
            known = {models[member].seeds for member in group}
            if model.seeds not in {None, *known} and _is_same_recipe(first, model):
                group.append(number)
                break
        else:
            groups.append([number])
    return groups if len(groups) > 1 else [[number] for number in range(len(models))]


def _is_same_recipe(one: _Model, other: _Model) -> bool:
    if one.source.run is None or other.source.run is None or one.source.step != other.source.step:
        return False
    return not _differences(one, other, pooled=True)


def _differences(one: _Model, other: _Model, pooled: bool) -> tuple[Difference, ...]:
    """Differences of model, recipe and tokenizer; without the seeds if these are pooled."""
    found = compare_sources(one.source, other.source)
    skipped = (*INCIDENTAL, *(SEEDS if pooled else ()))
    recipe = [item for item in found.recipe or () if not item.key.startswith(skipped)]
    more = []
    if one.source.step != other.source.step:
        more.append(Difference("step", one.source.step, other.source.step))
    if one.tokenizer.sha256 != other.tokenizer.sha256:
        more.append(
            Difference("entries of the tokenizer", one.tokenizer.vocab_size, other.tokenizer.vocab_size)
        )
    return (*found.config, *recipe, *more)


def _notes(
    models: Sequence[_Model], groups: Sequence[Sequence[int]], blocks: Blocks, is_chat: bool
) -> tuple[str, ...]:
    """What the intervals do not cover."""
    notes = []
    documents = len(blocks.first) - 1
    if blocks.by_document:
        pass
    elif is_chat:
        notes.append("There are few conversations, so the intervals are rough.")
    else:
        text = "is one document" if documents == 1 else "has few documents, or one of them is most of it"
        notes.append(
            f"The text {text}, so parts of {BLOCK:,} bytes are resampled: the intervals do not cover other "
            "documents."
        )
    runs = {one.name.partition("@")[0] for one in models if one.source.run is not None}
    if len(runs) > 1 and any(len(group) == 1 for group in groups):
        notes.append(
            "The intervals do not cover other seeds: add runs that differ only in train.seed, which count as "
            "one model."
        )
    return tuple(notes)
