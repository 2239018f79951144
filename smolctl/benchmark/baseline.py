"""A saved bench, and the comparison of a new one with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator
from typing_extensions import TypedDict

from smolctl.benchmark.metrics import SECONDS
from smolctl.benchmark.report import BenchReport, Result
from smolctl.durable import write_text
from smolctl.errors import GateError, InputError, SmolError
from smolctl.escaping import json_text
from smolctl.outside import checked, read_json, shown
from smolctl.timing import median_interval

FORMAT, VERSION = "smolctl-bench", 1
REMEDY = "Make a new baseline here with --save."


def _not_zero(value: float) -> float:
    if value == 0:
        raise ValueError("must not be 0")
    return value


Divisor = Annotated[float, AfterValidator(_not_zero)]


class _Limits(TypedDict):
    bandwidth: Divisor


class _Machine(TypedDict):
    cpu: str
    logical_cpus: int
    threads: int
    versions: dict[str, str]
    limits: _Limits


class _Model(TypedDict):
    id: str
    parameters: int
    shape: str


class _Result(TypedDict):
    suite: str
    engine: str
    precision: str
    work: str
    median: Divisor
    values: list[float]


class Baseline(TypedDict):
    """The parts of a document written by `--save` that a comparison reads."""

    machine: _Machine
    model: _Model
    results: list[_Result]
    disturbed: NotRequired[str]


@dataclass(frozen=True)
class Change:
    """A result and the corresponding one of the baseline."""

    result: Result
    before: float  # median of the baseline
    ratio: float  # ratio of the speeds; below 1, the new result is slower
    beyond_noise: bool | None  # the intervals of both medians do not touch; None: too few repeats


@dataclass(frozen=True)
class Changes:
    """The comparison with a baseline."""

    path: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...]  # differences that smolctl's code does not cause
    missing: tuple[str, ...]  # results of only one side, which cannot be compared
    disturbed: str  # why either side's numbers are doubtful; "" if they are not
    fail_below: float | None

    @property
    def failed(self) -> tuple[Change, ...]:
        """Changes below the limit, beyond the noise or not: whoever sets the limit knows the noise."""
        limit = self.fail_below
        return tuple(one for one in self.changes if limit is not None and not one.ratio >= limit)

    def require_passed(self) -> None:
        """Check that no result is below the limit, if one is set.

        Raises:
            GateError: naming the results that are, or that exist on one side only.
        """
        if self.failed:
            named = ", ".join(f"{one.result.name} × {one.ratio:.2f}" for one in self.failed)
            doubt = f"; the machine was busy: {self.disturbed}" if self.disturbed else ""
            raise GateError(
                f"below {self.fail_below} of the baseline: {named}{doubt}", "Repeat on an idle machine."
            )
        if self.missing and self.fail_below is not None:
            raise GateError(
                f"not compared with the baseline: {'; '.join(self.missing)}",
                "Measure the same suites and schemes on both sides.",
            )


def read_baseline(path: Path) -> Baseline:
    """Read a document that `--save` has written.

    Raises:
        InputError: it is missing, or is not such a document.
    """
    content = read_json(path, REMEDY)
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: not a file of `smolctl bench --save`", REMEDY)
    if content.get("version") != VERSION:
        version = shown(content.get("version"))
        raise InputError(f"{path}: version {version}, but this smolctl reads version {VERSION}", REMEDY)
    return checked(Baseline, content, f"{path}: damaged", REMEDY)


def is_baseline(path: Path) -> bool:
    """Whether `save_record` has written a file."""
    try:
        return bool(read_baseline(path))
    except InputError:
        return False


def save_record(document: Mapping[str, Any], path: Path) -> None:
    """Write a bench's document atomically.

    Raises:
        SmolError: it cannot be written.
    """
    try:
        write_text(path, json_text(document, indent=1) + "\n")
    except OSError as error:
        raise SmolError(f"{path}: cannot be written ({error.strerror})", "Name another file.") from None


def compare_with(report: BenchReport, path: Path, fail_below: float | None) -> Changes:
    """Compare new results with a baseline.

    Raises:
        InputError: the baseline is damaged, comes from another machine or model, or has no result in common.
    """
    content = read_baseline(path)
    machine, model = content["machine"], content["model"]
    then = (machine["cpu"], machine["logical_cpus"], machine["threads"])
    if then != report.machine.identity:
        raise InputError(
            f"{path}: from another machine: {_named(then)}; here: {_named(report.machine.identity)}", REMEDY
        )
    if model["shape"] != report.model.shape:
        raise InputError(
            f"{path}: from another model: {model['id']}, {model['parameters']:,} parameters; "
            f"this one is {report.model.id}, {report.model.parameters:,}",
            REMEDY,
        )
    before = {(one["suite"], one["engine"], one["precision"], one["work"]): one for one in content["results"]}
    changes = [_change(now, before[now.key]) for now in report.results if now.key in before]
    if not changes:
        raise InputError(f"{path}: has no result in common with this run", "Run the same suites.")
    now = {one.key for one in report.results}
    missing = [
        *(f"{_label(key)} is in the baseline only" for key in before if key not in now),
        *(f"{_label(key)} is not in the baseline" for key in sorted(now - before.keys())),
    ]
    disturbed = report.disturbed or content.get("disturbed", "")
    return Changes(str(path), tuple(changes), _notes(report, content), tuple(missing), disturbed, fail_below)


def _label(key: tuple[str, str, str, str]) -> str:
    """The key of a result, for people."""
    suite, engine, precision, work = key
    return f"{suite} {engine} {precision} ({work})"


def _named(identity: tuple[str, int, int]) -> str:
    return f"{identity[0]}, {identity[1]} processors, {identity[2]} threads"


def _change(now: Result, then: _Result) -> Change:
    before = then["median"]
    ratio = before / now.median if now.unit == SECONDS else now.median / before
    today, that_day = now.interval, median_interval(then["values"])
    beyond = None
    if today is not None and that_day is not None:
        beyond = today[0] > that_day[1] or today[1] < that_day[0]
    return Change(now, before, ratio, beyond)


def _notes(report: BenchReport, content: Baseline) -> tuple[str, ...]:
    then, now = content["machine"]["versions"], report.machine.versions
    notes = [
        f"{name} was {then.get(name, 'not installed')}, is {now.get(name, 'not installed')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if content.get("disturbed"):
        notes.append(f"the baseline was disturbed: {content['disturbed']}")
    old, new = content["machine"]["limits"]["bandwidth"], report.limits.bandwidth
    if not 0.9 < new / old < 1.1:
        notes.append(f"the machine itself reads memory at {new / old:.2f} × the baseline's rate")
    return tuple(notes)
