"""What a bench has found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from smolctl.arithmetic import count_parameters
from smolctl.benchmark.limits import Limits
from smolctl.benchmark.machine import Load, Machine
from smolctl.benchmark.parts import SECONDS
from smolctl.config import ModelConfig
from smolctl.timing import Ratio, median_interval, ratio_of

# Fields of a config that change no time.
NO_MATTER = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "rope_theta",
    "rms_norm_eps",
}


@dataclass(frozen=True)
class ModelFacts:
    """The model that was measured; equal shapes take equal times, whatever their weights are."""

    id: str
    parameters: int
    shape: str  # hash of the config's sizes

    @staticmethod
    def of(model: str, config: ModelConfig) -> ModelFacts:
        sizes = json.dumps(config.model_dump(mode="json", exclude=NO_MATTER), sort_keys=True)
        digest = hashlib.sha256(sizes.encode()).hexdigest()[:16]
        return ModelFacts(model, count_parameters(config).unique, digest)


@dataclass(frozen=True)
class Result:
    """One number of one contender over all repeats."""

    suite: str
    model: str
    engine: str
    precision: str
    build: str  # the engine's own words
    work: str
    unit: str
    values: tuple[float, ...]  # round by round
    median: float
    min: float
    max: float
    peak_rss_bytes: int | None  # most that the contender's process held; None where that is not told
    roofline_share: float | None  # of the limit below; None where no limit was measured
    limit: str | None
    answer_error: float | None  # distance from the plain PyTorch network's answer; None: no answer
    allowed_error: float | None
    rival_of: str = ""  # the model of ours that stores the same bits; "": all of them

    @property
    def right(self) -> bool:
        """Whether the answers were what they should be, in every repeat."""
        return self.answer_error is None or self.answer_error <= (self.allowed_error or 0.0)

    @property
    def interval(self) -> tuple[float, float] | None:
        return median_interval(self.values)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What a result is the same as in another run."""
        return self.suite, self.engine, self.precision, self.work


@dataclass(frozen=True)
class Comparison:
    """How many times as fast one is as another, in the same rounds."""

    suite: str
    engine: str
    precision: str
    against: str
    against_precision: str
    ratio: Ratio  # of speeds: above 1 the first one is faster


@dataclass(frozen=True)
class BenchReport:
    """Everything."""

    machine: Machine
    load: Load
    disturbed: str  # why the numbers are to be doubted; ""
    limits: Limits
    model: ModelFacts
    repeats: int
    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]

    @property
    def wrong(self) -> tuple[Result, ...]:
        """Results with answers that are not what they should be."""
        return tuple(result for result in self.results if not result.right)


def compare(results: Sequence[Result]) -> tuple[Comparison, ...]:
    """Every result of ours beside the peers' and beside ours of the stored weights.

    Only equal work is compared, and a contender whose answers are wrong is not.
    """
    found = []
    for ours in results:
        if ours.engine != "smolctl" or not ours.right:
            continue
        stored = next(one for one in results if one.suite == ours.suite and one.engine == "smolctl")
        peers = [one for one in results if one.engine != "smolctl" and one.rival_of in ("", ours.model)]
        for other in [*([stored] if stored is not ours else []), *peers]:
            if (other.suite, other.work) == (ours.suite, ours.work) and other.right:
                found.append(
                    Comparison(
                        ours.suite,
                        ours.engine,
                        ours.precision,
                        other.engine,
                        other.precision,
                        speed_ratio(ours.unit, ours.values, other.values),
                    )
                )
    return tuple(found)


def speed_ratio(unit: str, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Above 1 where ours are faster: more of something a second, or fewer seconds."""
    return ratio_of(theirs, ours) if unit == SECONDS else ratio_of(ours, theirs)
