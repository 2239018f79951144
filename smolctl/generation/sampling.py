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

# The functions below process one row of logits at a time in NumPy: with a vocabulary of 49,152, torch's
# operators wake their threads at every call, which takes longer than the work, and a full sort takes longer
# than a whole step of a small model.

# Weights are first summed in blocks of this size, so that a draw searches only one block.
BLOCK = 256
# The search for the threshold of top-p starts at these shares of the likeliest token's probability, continues
# by splitting the tokens between two of them at their mean, and sorts only a few tokens in the end.
RUNGS = (0.1, 1e-2, 1e-3, 1e-4, 0.0)
FEW = 1024
# Limits of temperature and penalty: values far beyond any use overflow float32.
MOST = 1_000_000


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen. The defaults keep the model's own distribution.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens with this probability together
    min_p: float = 0.0  # keep tokens with at least this share of the likeliest token's probability
    repetition_penalty: float = 1.0  # divide the logits of tokens that already occurred (Keskar et al., 2019)

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
    """Logits that are not finite, so no token can be chosen or scored."""

    def __init__(self) -> None:
        super().__init__(
            "the model's output is not finite", "Its weights are damaged, or its training has diverged."
        )


# Used by `smolctl sample` if neither the user nor the model specifies a setting.
DEFAULT_SAMPLING = SamplingSettings(temperature=0.8, top_p=0.95)


def applicable(recommended: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recommended fields that apply: those that the user does not set.

    If the user sets temperature 0, the model's likeliest token is meant, so no recommended penalty applies.
    """
    greedy = own.get("temperature") == 0
    return {} if greedy else {key: value for key, value in recommended.items() if key not in own}


def resolve_sampling(own: Mapping[str, Any], recommended: Mapping[str, Any]) -> SamplingSettings:
    """The sampling settings: the user's, else the recommendation of the model's authors, else the defaults.

    Args:
        own: fields that the user sets.
        recommended: fields that the authors recommend.

    Raises:
        UsageError: a value is out of range; the message names it.
    """
    return replace(DEFAULT_SAMPLING, **applicable(recommended, own), **own)


def choose(
    logits: NDArray[np.float32],
    settings: SamplingSettings,
    generator: Random,
    seen: Sequence[int],
) -> int:
    """Choose the next token of a sequence. Draws one number from the generator.

    Args:
        logits: (V,).
        settings: how to choose.
        generator: the only source of randomness; not used when temperature is 0.
        seen: token ids already in the sequence, for the repetition penalty.
    """
    logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return int(logits.argmax())
    return _draw(distribution(logits, settings), generator.random())


def generator_for(seed: int, *place: int) -> Random:
    """A generator for one of many sequences, determined by the seed and by numbers that identify the
    sequence.

    Python guarantees that `random()` gives the same numbers in later versions.
    """
    return Random(repr((seed, *place)))


def penalize_repetition(
    logits: NDArray[np.float32], seen: Sequence[int], penalty: float
) -> NDArray[np.float32]:
    """Make tokens that occurred less likely: positive logits are divided, negative ones multiplied."""
    if penalty == 1.0:
        return logits
    ids = np.asarray(seen)
    penalized, at_seen = logits.copy(), logits[ids]
    penalized[ids] = np.where(at_seen > 0, at_seen / penalty, at_seen * penalty)
    return penalized


def log_normalizer(logits: NDArray[np.float32]) -> float:
    """What to subtract from one row of logits, (V,), to get log-probabilities in nats.

    Raises:
        InputError: the logits are not finite.
    """
    top = float(logits.max())
    total = float(np.exp(logits - top).sum()) if math.isfinite(top) else math.nan
    if not math.isfinite(total):
        raise NotFiniteError
    return top + math.log(total)


def likeliest(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The ids of the largest logits of one row, (V,), the largest first."""
    few = np.argpartition(logits, -count)[-count:] if count < len(logits) else np.arange(len(logits))
    return few[np.argsort(-logits[few], kind="stable")]


def margin(logits: NDArray[np.float32]) -> float:
    """The distance of the largest logit of one row, (V,), from the second largest."""
    best = int(logits.argmax())
    before, behind = logits[:best], logits[best + 1 :]
    return float(logits[best] - max(before.max(initial=-np.inf), behind.max(initial=-np.inf)))


def distribution(logits: NDArray[np.float32], settings: SamplingSettings) -> NDArray[np.float32]:
    """Probabilities (V,) after temperature, top-k, top-p and min-p, in this order."""
    out: NDArray[np.float32] = logits - logits.max()
    out /= np.float32(max(settings.temperature, 1 / MOST))
    np.exp(out, out=out)  # relative to the likeliest token
    if 0 < settings.top_k < len(out):
        out *= out >= np.partition(out, -settings.top_k)[-settings.top_k]
    if settings.top_p < 1:
        _keep_nucleus(out, settings.top_p)
    if settings.min_p:
        out *= out >= settings.min_p
    out /= out.sum()
    return out


def _keep_nucleus(weights: NDArray[np.float32], top_p: float) -> None:
    """Set to 0 all weights, (V,), outside the smallest set with a share `top_p` of their sum.

    A token is kept if those before it, in order of weight and then id, have not yet reached the share.
    """
    goal = top_p * float(weights.sum(dtype=np.float64))
    ceiling = np.inf
    for floor in RUNGS:  # few tokens reach the first thresholds, and usually these are enough
        unsure = weights[weights >= floor]
        if float(unsure.sum(dtype=np.float64)) >= goal or floor == 0:
            break
        ceiling = floor
    surely = unsure[unsure >= ceiling]  # certainly kept; those below `unsure` are dropped
    above, mass_above = len(surely), float(surely.sum(dtype=np.float64))
    unsure = unsure[unsure < ceiling]
    while len(unsure) > FEW:
        high = unsure >= unsure.mean()
        if high.all() or not high.any():
            break  # all equal, up to the rounding of their mean
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
    if surplus > 0:  # of equally likely tokens at the threshold, those with lower ids are kept
        stays[np.flatnonzero(weights == smallest)[-surplus:]] = False
    weights *= stays


def _draw(probabilities: NDArray[np.float32], draw: float) -> int:
    """The token at which the cumulative sum of probabilities, (V,), exceeds the share `draw` of their sum."""
    edges = np.arange(0, len(probabilities), BLOCK)
    ends = np.add.reduceat(probabilities, edges, dtype=np.float64).cumsum()
    target = draw * ends[-1]
    # The clips are needed because sums by block and one by one round differently.
    block = min(int(np.searchsorted(ends, target, side="right")), int(np.searchsorted(ends, ends[-1])))
    part = probabilities[block * BLOCK : (block + 1) * BLOCK]
    sums = part.cumsum(dtype=np.float64)
    start = ends[block - 1] if block else 0.0
    place = min(
        int(np.searchsorted(sums, target - start, side="right")), int(np.searchsorted(sums, sums[-1]))
    )
    return block * BLOCK + place
