"""Records of a run: JSON lines, one per event, appended and flushed immediately; and lists of measurements.

A later version may have written them: unknown keys are ignored, and so are lines that cannot be parsed, so
that reading them never fails.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from smolctl.durable import write_json, write_text
from smolctl.errors import InputError
from smolctl.escaping import json_text
from smolctl.outside import fitting, fitting_json, read_json

R = TypeVar("R")
V = TypeVar("V", bound=Mapping[str, Any])  # a ValidationRecord
EVERY_STEP = (1 << 62) - 1
MAX_LINE = 10_000_000  # characters
StepNumber = Annotated[int, Field(ge=0, le=EVERY_STEP)]


class StepRecord(TypedDict):
    """The fields of an `events.Step` that are read from metrics.jsonl."""

    event: Literal["step"]
    step: StepNumber
    loss: FiniteFloat | None
    z_loss: NotRequired[FiniteFloat | None]
    learning_rate: FiniteFloat
    gradient_norm: FiniteFloat | None
    tokens: int
    seconds: FiniteFloat
    tokens_per_second: NotRequired[FiniteFloat]
    memory_bytes: NotRequired[int | None]
    mfu: NotRequired[FiniteFloat | None]
    skipped: NotRequired[int]


class ValidationRecord(TypedDict):
    """The fields of an `events.Validation` that are read from metrics.jsonl."""

    event: Literal["validation"]
    step: StepNumber
    bits_per_byte: FiniteFloat
    standard_error: FiniteFloat | None
    loss: FiniteFloat
    tokens: NotRequired[int | None]


class _Numbered(TypedDict):
    step: StepNumber


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record to a file."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json_text(record) + "\n")


def read_records(path: Path, schema: type[R], last: int = EVERY_STEP) -> Iterator[R]:
    """Every record up to step `last` that fits a schema. A line truncated by a crash does not; a missing
    file has none.
    """
    records = (fitting_json(schema, line) for line in _lines(path, last))
    return (record for record in records if record is not None)


def best_validation(validations: Iterable[V], steps: Container[int] | None = None) -> V | None:
    """The record with the lowest bits per byte, the first of equal ones; None if there is none.

    If several texts were scored, only the scores of the last one count.

    Args:
        validations: of a run, in order of steps.
        steps: to consider; None: all.
    """
    records = list(validations)
    tokens = records[-1].get("tokens") if records else None
    alike = (record for record in records if record.get("tokens", tokens) == tokens)
    considered = (record for record in alike if steps is None or record["step"] in steps)
    return min(considered, key=lambda record: record["bits_per_byte"], default=None)


def keep_records(path: Path, last: int, target: Path | None = None) -> None:
    """Write the records up to step `last` to `target`, by default to the same file.

    Records of a later version are kept unchanged.
    """
    if path.is_file():
        write_text(target or path, "".join(f"{line}\n" for line in _lines(path, last)))


def read_measurements(path: Path, name: str, schema: type[R]) -> list[Mapping[str, Any]]:
    """The items of the list `name` in a JSON file that fit a schema; empty if the file cannot be read."""
    try:
        found = read_json(path).get(name)
    except InputError:
        return []
    return [one for one in found if fitting(schema, one)] if isinstance(found, list) else []


def add_measurements(
    path: Path, name: str, schema: type[R], fresh: Sequence[Mapping[str, Any]], identity: Sequence[str]
) -> None:
    """Add to the list `name` in a JSON file, replacing items with equal values for these keys."""

    def what(one: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(one.get(key) for key in identity)

    replaced = set(map(what, fresh))
    kept = [one for one in read_measurements(path, name, schema) if what(one) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {name: [*kept, *fresh]})


def _lines(path: Path, last: int) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for line in iter(lambda: file.readline(MAX_LINE), ""):
                record = fitting_json(_Numbered, line)
                if record is not None and record["step"] <= last:
                    yield line.rstrip("\n")
