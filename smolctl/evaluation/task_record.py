"""Results of tasks for a run, stored in its folder for the model card."""

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
    """A task as stored in a run's record."""

    task: str
    version: str
    shots: int | None
    items: int
    limit: FiniteFloat | None
    chat: bool
    step: int | None
    lm_eval: str  # version of lm-eval
    metrics: list[RecordedMetric]


def record_tasks(run: Path, tasks: Iterable[Mapping[str, Any]]) -> None:
    """Add results to a run's record; a new result replaces one of the same task with the same options.

    Args:
        run: its folder.
        tasks: each with at least the keys of `RecordedTask`.
    """
    add_measurements(
        run / TASKS, RESULTS, RecordedTask, list(tasks), ("task", "step", "shots", "limit", "chat")
    )


def read_tasks(run: Path, step: int | None) -> list[RecordedTask]:
    """The results recorded at a step; an unreadable record counts as empty."""
    found = read_measurements(run / TASKS, RESULTS, RecordedTask)
    checked = (fitting(RecordedTask, one) for one in found)  # converts numbers that were stored as text
    return [one for one in checked if one is not None and one["step"] == step]
