"""Results of tasks on a model: a table, JSON, and a file of every item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from smolctl.durable import write_text
from smolctl.errors import SmolError
from smolctl.escaping import json_text
from smolctl.evaluation.tasks import TaskReport
from smolctl.outside import fitting_json
from smolctl.runs.records import MAX_LINE
from smolctl.timing import with_error
from smolctl.views.numbers import duration
from smolctl.views.output import Output, fields
from smolctl.views.tables import headed

LEFT = ("task", "metric")


class _Sample(TypedDict):
    """The keys that every line of `write_samples` has."""

    task: str
    doc_id: int


def show_tasks(out: Output, report: TaskReport) -> None:
    """Show the figures and their basis."""
    out.document(
        {**fields(report, ("run", "tasks", "document", "samples", "library")), "lm_eval": report.library}
        | dict(report.document)
    )
    if out.json:
        return
    at = "" if report.step is None else f" at step {report.step:,}"
    chat = ", in its chat template" if report.chat else ""
    out.line(f"{report.model}{at}{chat}: {report.engine}, {duration(report.seconds)}")
    out.show("", _table(report), "")
    out.line(f"± is one standard error over the items. lm-eval {report.library}.")
    if report.limit is not None:
        out.line("Only some items were used (--limit): do not compare these figures with others'.")


def _table(report: TaskReport) -> Any:
    from rich.text import Text

    table = headed(("task", "version", "shots", "items", "metric", "value"), LEFT)
    for task in report.tasks:
        shots = "" if task.shots is None else str(task.shots)
        asked = (Text(task.task), task.version, shots, f"{task.items:,}")
        for number, metric in enumerate(task.metrics):
            name = metric.name if metric.filter == "none" else f"{metric.name}, {metric.filter}"
            value = with_error(metric.value, metric.standard_error)
            table.add_row(*(("",) * 4 if number else asked), Text(name), value)
    return table


def is_samples(path: Path) -> bool:
    """Whether `write_samples` has written a file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return fitting_json(_Sample, file.readline(MAX_LINE)) is not None


def write_samples(path: Path, report: TaskReport) -> None:
    """Write every item with the model's answers as a JSON line.

    Raises:
        SmolError: the file cannot be written.
    """
    lines = (
        json_text({"task": task, **sample}) for task, samples in report.samples.items() for sample in samples
    )
    try:
        write_text(path, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise SmolError(
            f"{path}: cannot be written ({error.strerror})", "Name another file with --samples."
        ) from None
