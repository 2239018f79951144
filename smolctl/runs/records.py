"""Records of a run as lines of JSON: one line an event, appended and flushed at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smolctl.durable import write_text
from smolctl.escaping import json_text

_NEVER = 1 << 62
EVERY_STEP = _NEVER - 1


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record to a file."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json_text(record) + "\n")


def read_records(path: Path, last: int = EVERY_STEP) -> Iterator[dict[str, Any]]:
    """Every record up to step `last`. A line that a crash has cut off is left out; so is a missing file."""
    return (json.loads(line) for line in _lines(path, last))


def keep_records(path: Path, last: int, target: Path | None = None) -> None:
    """Write the records up to step `last` to `target`, by default in place of the file they are in."""
    if path.exists():
        write_text(target or path, "".join(f"{line}\n" for line in _lines(path, last)))


def _lines(path: Path, last: int) -> Iterator[str]:
    if path.exists():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from (line.rstrip("\n") for line in file if _step_of(line) <= last)


def _step_of(line: str) -> int:
    """The step of a record; a line that a crash has cut off comes after every step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return _NEVER
