"""The results of a bench."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from smolctl.arithmetic import count_parameters
from smolctl.benchmark.limits import HardwareLimits
from smolctl.benchmark.machine import Machine, SystemLoad
from smolctl.benchmark.metrics import SECONDS
from smolctl.config import ModelConfig
from smolctl.errors import GateError
from smolctl.timing import Ratio, median_interval, ratio_of

# Fields of a config that do not affect times.
IRRELEVANT_FIELDS = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "rope_theta",
    "rms_norm_eps",
}


@dataclass(frozen=True)
class ModelFacts:
    """The measured model; models of equal shape take equal times, whatever their weights are."""

    id: str
    parameters: int
    shape: str  # hash of the config's sizes

    @staticmethod
    def of(model: str, config: ModelConfig) -> ModelFacts:
        sizes = json.dumps(config.model_dump(mode="json", exclude=IRRELEVANT_FIELDS), sort_keys=True)  # noqa: TID251 - to be hashed
        digest = hashlib.sha256(sizes.encode()).hexdigest()[:16]
        return ModelFacts(model, count_parameters(config).unique, digest)


@dataclass(frozen=True)
class Result:
    """One metric of one engine and model over all repeats."""

    suite: str
    model: str
    engine: str
    precision: str
    build: str  # the engine's description of its build
    work: str
    unit: str
    values: tuple[float, ...]  # round by round
    median: float
    min: float
    max: float
    peak_rss_bytes: int | None  # of the engine's process; None where the system does not report it
    roofline_share: float | None  # share of the limit below; None if no limit was measured
    limit: str | None
    answer_error: float  # difference from the output of the plain PyTorch network
    allowed_error: float
    rival_of: str = ""  # smolctl's model with the same number of bits; "": compared with every one

    @property
    def name(self) -> str:
        return f"{self.suite} {self.engine} {self.precision}"

    @property
    def right(self) -> bool:
        """Whether the output was correct in every repeat."""
        return self.answer_error <= self.allowed_error

    @property
    def interval(self) -> tuple[float, float] | None:
        return median_interval(self.values)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Identifies the comparable result of another run."""
        return self.suite, self.engine, self.precision, self.work


@dataclass(frozen=True)
class RelativeSpeed:
    """The speed of one result relative to another of the same rounds."""

    suite: str
    engine: str
    precision: str
    against: str
    against_precision: str
    ratio: Ratio  # ratio of the speeds; above 1, the first one is faster


@dataclass(frozen=True)
class BenchReport:
    """All results of a bench."""

    machine: Machine
    load: SystemLoad
    disturbed: str  # why the numbers are doubtful; "" if they are not
    limits: HardwareLimits
    model: ModelFacts
    repeats: int
    results: tuple[Result, ...]
    comparisons: tuple[RelativeSpeed, ...]
    notes: tuple[str, ...]

    @property
    def wrong(self) -> tuple[Result, ...]:
        """Results with an incorrect output."""
        return tuple(result for result in self.results if not result.right)

    def require_right(self) -> None:
        """Check that every engine's output was correct. Raises GateError."""
        if self.wrong:
            named = ", ".join(one.name for one in self.wrong)
            raise GateError(f"wrong output: {named}", "Ignore their speed, and report this.")


def compare(results: Sequence[Result]) -> tuple[RelativeSpeed, ...]:
    """Compare every result of smolctl with the peers', and with smolctl's for the stored weights.

    Only results of equal work are compared, and only if both outputs are correct.
    """
    found = []
    for ours in results:
        if ours.engine != "smolctl" or not ours.right:
            continue
        stored = next(one for one in results if one.suite == ours.suite and one.engine == "smolctl")
        peers = [one for one in results if one.engine != "smolctl" and one.rival_of in ("", ours.model)]
        for other in [*([stored] if stored is not ours else []), *peers]:
            if (other.suite, other.work) == (ours.suite, ours.work) and other.right:
                pair = ours.suite, ours.engine, ours.precision, other.engine, other.precision
                found.append(RelativeSpeed(*pair, speed_ratio(ours.unit, ours.values, other.values)))
    return tuple(found)


def speed_ratio(unit: str, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Above 1 if smolctl is faster: a higher rate, or fewer seconds."""
    return ratio_of(theirs, ours) if unit == SECONDS else ratio_of(ours, theirs)
