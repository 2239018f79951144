"""environment.json of a run: for each session, the machine, the versions, and the settings chosen for
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from smolctl.durable import write_json
from smolctl.errors import InputError
from smolctl.outside import fitting, read_json
from smolctl.runs.checkpoint_file import DAMAGED


class _Session(TypedDict, total=False):
    """The relevant part of environment.json."""

    devices: list[str]
    device: str
    threads: int | None
    packages: dict[str, str | None]
    smolctl: str
    data: list[str]


class _Environment(_Session, total=False):
    earlier: list[_Session]


def read_environment(path: Path) -> dict[str, Any]:
    """Read the recorded environment; empty if there is none or it cannot be parsed."""
    content = read_if_sound(path)
    return content if fitting(_Environment, content) is not None else {}


def write_environment(path: Path, environment: Mapping[str, Any]) -> None:
    """Write the environment of a new run."""
    write_json(path, environment)


def update_environment(path: Path, environment: Mapping[str, Any]) -> None:
    """Record that a run continues on another machine or with other settings; the earlier record is kept in
    `earlier`, or under another name if it cannot be read.
    """
    before = read_if_sound(path)
    if not before and path.exists():
        path.replace(f"{path}{DAMAGED}")
    earlier = before.pop("earlier", [])
    earlier = earlier if isinstance(earlier, list) else [earlier]
    if before != environment:
        write_environment(path, {**environment, "earlier": [*earlier, before]} if before else environment)


def read_if_sound(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or damaged."""
    try:
        return read_json(path)
    except InputError:
        return {}
