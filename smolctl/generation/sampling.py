"""From logits to a token: pure functions of (logits, settings, generator)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolctl.errors import InputError, UsageError

# Everything below works on one row of logits at a time in NumPy: at a vocabulary of 49,152 torch's operators
# wake their threads for every call, which takes longer than the work, and a full sort takes longer than a
# whole step of a small model.

# Weights are summed in blocks of this size first, so that a draw looks into one block only.
BLOCK = 256
# The search for the edge of top-p starts at these shares of the likeliest token, goes on by splitting what is
# between two of them at its mean, and sorts no more than a few tokens in the end.
RUNGS = (0.1, 1e-2, 1e-3, 1e-4, 0.0)
FEW = 1024
# Of a temperature and a penalty: what is far beyond any use of them overflows float32.
MOST = 1_000_000


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen. The defaults keep the model's own distribution.

    Raises:
        UsageError: a value outside its range, named.
    """

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens with this probability together
    min_p: float = 0.0  # keep tokens at least this share as likely as the most likely one
    repetition_penalty: float = 1.0  # divide the logits of tokens already there (Keskar et al., 2019)

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        ranges = (
            ("temperature", self.temperature, 0 <= self.temperature <= MOST, f"from 0 to {MOST:,}"),
            ("top-k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min-p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            (
                "repetition-penalty",
                penalty,
                1 / MOST <= penalty <= MOST,
                f"from {1 / MOST:g} to {MOST:,}",
            ),
        )
        for option, value, fits, limits in ranges:
            if not fits:
                raise UsageError(f"--{option} {value} is out of range", f"It must be {limits}.")


class NotFiniteError(InputError):
    """Logits are not numbers to choose by or to score."""

    def __init__(self) -> None:
        super().__init__(
            "the model's output is not finite", "Its weights are damaged, or its training has diverged."
        )


# What `smolctl sample` takes where neither the user nor the model says anything.
DEFAULT_SAMPLING = SamplingSettings(temperature=0.8, top_p=0.95)


def taken_of(recommended: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """What counts of the fields that a model's makers recommend: those that the user leaves open.

    A temperature of 0 of the user's asks for the model's likeliest token, and no penalty for another one.
    """
    greedy = own.get("temperature") == 0
    return {} if greedy else {key: value for key, value in recommended.items() if key not in own}


def settle(own: Mapping[str, Any], recommended: Mapping[str, Any]) -> SamplingSettings:
    """How to choose tokens: as the user says, else as the model's makers recommend, else by default.

    Args:
        own: fields that the user sets.
        recommended: fields that the makers recommend.

    Raises:
        UsageError: a value outside its range, named.
    """
    return replace(DEFAULT_SAMPLING, **taken_of(recommended, own), **own)


def choose(
    logits: NDArray[np.float32],
    settings: SamplingSettings,
    generator: Random,
    seen: Sequence[int],
) -> int:
    """The next token of a sequence. It takes one number from the generator.

    Args:
        logits: (V,).
        settings: how to choose.
        generator: the only source of chance; untouched when temperature is 0.
        seen: token ids already in the sequence, for the repetition penalty.
    """
    logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return int(logits.argmax())
    return _draw(distribution(logits, settings), generator.random())


def generator_for(seed: int, *place: int) -> Random:
    """A generator for one of many sequences: by the seed and by numbers that say which one it is.

    Python promises the same numbers from `random()` in its later versions.
    """
    return Random(repr((seed, *place)))


def penalize_repetition(
    logits: NDArray[np.float32], seen: Sequence[int], penalty: float
) -> NDArray[np.float32]:
    """Make tokens that were seen less likely: positive logits divided, negative ones multiplied."""
    if penalty == 1.0:
        return logits
    ids = np.asarray(seen)
    penalized, at_seen = logits.copy(), logits[ids]
    penalized[ids] = np.where(at_seen > 0, at_seen / penalty, at_seen * penalty)
    return penalized


def log_normalizer(logits: NDArray[np.float32]) -> float:
    """What to subtract from one row of logits, (V,), to get log-probabilities in nats.

    Raises:
        InputError: the logits are not numbers to choose by.
    """
    top = float(logits.max())
    total = float(np.exp(logits - top).sum()) if math.isfinite(top) else math.nan
    if not math.isfinite(total):
        raise NotFiniteError
    return top + math.log(total)


def likeliest(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The ids of the largest of one row of logits, (V,), the largest first."""
    few = np.argpartition(logits, -count)[-count:] if count < len(logits) else np.arange(len(logits))
    return few[np.argsort(-logits[few], kind="stable")]


def margin(logits: NDArray[np.float32]) -> float:
    """By how much the largest of one row of logits, (V,), exceeds every other."""
    best = int(logits.argmax())
    before, behind = logits[:best], logits[best + 1 :]
    return float(logits[best] - max(before.max(initial=-np.inf), behind.max(initial=-np.inf)))


def distribution(logits: NDArray[np.float32], settings: SamplingSettings) -> NDArray[np.float32]:
    """Probabilities (V,) after temperature, top-k, top-p and min-p, in this order."""
    out: NDArray[np.float32] = logits - logits.max()
    out /= np.float32(max(settings.temperature, 1 / MOST))
    np.exp(out, out=out)  # shares of the likeliest token
    if 0 < settings.top_k < len(out):
        out *= out >= np.partition(out, -settings.top_k)[-settings.top_k]
    if settings.top_p < 1:
        _keep_nucleus(out, settings.top_p)
    if settings.min_p:
        out *= out >= settings.min_p
    out /= out.sum()
    return out


def _keep_nucleus(weights: NDArray[np.float32], top_p: float) -> None:
    """Set to 0 what does not belong to the smallest set with a share `top_p` of the weights, (V,).

    A token stays when those before it, by weight and then by id, have not yet reached the share.
    """
    goal = top_p * float(weights.sum(dtype=np.float64))
    ceiling = np.inf
    for floor in RUNGS:  # few reach the first ones, and mostly they are enough
        unsure = weights[weights >= floor]
        if float(unsure.sum(dtype=np.float64)) >= goal or floor == 0:
            break
        ceiling = floor
    surely = unsure[unsure >= ceiling]  # stay; those below `unsure` go
    above, mass_above = len(surely), float(surely.sum(dtype=np.float64))
    unsure = unsure[unsure < ceiling]
    while len(unsure) > FEW:
        high = unsure >= unsure.mean()
        if high.all() or not high.any():
            break  # all the same, up to the rounding of their mean
        upper = unsure[high]
        mass = float(upper.sum(dtype=np.float64))
        if mass_above + mass >= goal:
            unsure = upper
        else:
            above, mass_above, unsure = above + len(upper), mass_above + mass, unsure[~high]
    ordered = np.sort(unsure)[::-1]
    before = mass_above + ordered.cumsum(dtype=np.float64) - ordered
    count = max(int(np.searchsorted(before, goal, side="left")), 1)
    smallest = ordered[min(count, len(ordered)) - 1]
    stays = weights >= smallest
    surplus = int(np.count_nonzero(stays)) - above - count
    if surplus > 0:  # of equally likely tokens at the edge those with the lower ids stay
        stays[np.flatnonzero(weights == smallest)[-surplus:]] = False
    weights *= stays


def _draw(probabilities: NDArray[np.float32], draw: float) -> int:
    """The token at which the running sum of (V,) probabilities passes `draw`, a share of their sum."""
    edges = np.arange(0, len(probabilities), BLOCK)
    ends = np.add.reduceat(probabilities, edges, dtype=np.float64).cumsum()
    target = draw * ends[-1]
    # The clips are for sums that round differently in blocks and one by one.
    block = min(int(np.searchsorted(ends, target, side="right")), int(np.searchsorted(ends, ends[-1])))
    part = probabilities[block * BLOCK : (block + 1) * BLOCK]
    sums = part.cumsum(dtype=np.float64)
    start = ends[block - 1] if block else 0.0
    place = min(
        int(np.searchsorted(sums, target - start, side="right")), int(np.searchsorted(sums, sums[-1]))
    )
    return block * BLOCK + place
