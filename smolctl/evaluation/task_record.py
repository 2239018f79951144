"""What tasks have found out about a run, kept in its folder for the model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat
from typing_extensions import TypedDict

from smolctl.outside import fitting
from smolctl.runs.layout import TASKS
from smolctl.runs.records import add_measurements, read_measurements

RESULTS = "tasks"


class RecordedMetric(TypedDict):
    """One figure of a task."""

    name: str
    filter: str
    value: FiniteFloat
    standard_error: FiniteFloat | None


class RecordedTask(TypedDict):
    """A task as a run's record has it."""

    task: str
    version: str
    shots: int | None
    items: int
    limit: FiniteFloat | None
    chat: bool
    step: int | None
    lm_eval: str  # its version
    metrics: list[RecordedMetric]


def record_tasks(run: Path, tasks: Iterable[Mapping[str, Any]]) -> None:
    """Add results to a run's record; of those of one task that were asked in one way the newest counts.

    Args:
        run: its folder.
        tasks: each with the keys of `RecordedTask`, and others.
    """
    add_measurements(
        run / TASKS, RESULTS, RecordedTask, list(tasks), ("task", "step", "shots", "limit", "chat")
    )


def read_tasks(run: Path, step: int | None) -> list[RecordedTask]:
    """What was recorded at a step; an unreadable record is an empty one."""
    found = read_measurements(run / TASKS, RESULTS, RecordedTask)
    checked = (fitting(RecordedTask, one) for one in found)  # numbers that were texts are numbers now
    return [one for one in checked if one is not None and one["step"] == step]
