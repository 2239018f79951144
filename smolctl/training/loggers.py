"""Additional outputs for metrics: Lightning's loggers, opened in the run folder and fed with its records.

The trainer itself gets no logger, because a failing one would end the run. metrics.jsonl is the record of the
run; a logger's files and pages are copies.
"""

from __future__ import annotations

import io
import os
import secrets
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smolctl.config import RunConfig
from smolctl.extras import missing_package
from smolctl.runs.events import Listener, Note
from smolctl.runs.layout import LOGS, WANDB_ID
from smolctl.training.lightning import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from smolctl.training.rng import keeping_rng
from smolctl.training.tolerance import reason

PROJECT = "smolctl"  # on the pages of wandb and trackio
FLUSH_EVERY = 20  # steps between two writes of metrics.csv

# Any of the packages suffices; the extra that installs the first one has the logger's name.
PACKAGES = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",), "trackio": ("trackio",)}

# For each kind of record, the keys that are logged, and their names in the log.
LOGGED = {
    "step": {
        key: key
        for key in (
            *("loss", "z_loss", "learning_rate", "gradient_norm"),
            *("tokens_per_second", "memory_bytes", "mfu"),
        )
    },
    "validation": {
        "bits_per_byte": "validation_bits_per_byte",
        "standard_error": "validation_standard_error",
        "loss": "validation_loss",
    },
}


def require_packages(loggers: Iterable[str]) -> None:
    """Check that the packages of loggers are installed, without importing them.

    Raises:
        MissingPackageError: one is missing, naming what to install.
    """
    for name in loggers:
        packages = PACKAGES.get(name, ())
        if packages and not any(find_spec(package) for package in packages):
            raise missing_package(packages[0], name, f"--logger {name}", "Or leave the logger out.")


def logged_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record of metrics.jsonl, or of an event, under their names in the log."""
    names = LOGGED.get(record["event"], {})
    return {name: record[key] for key, name in names.items() if record.get(key) is not None}


@dataclass(frozen=True)
class Opening:
    """The arguments with which a logger is opened.

    Args:
        folder: of the run.
        config: of the run.
        done: number of finished steps.
        records: of metrics.jsonl up to that step.
    """

    folder: Path
    config: RunConfig
    done: int
    records: Iterable[Mapping[str, Any]]


Opened = tuple[Logger, str]  # and how to view what it logs


class MetricLoggers:
    """The loggers of a run. One that fails is dropped with a note."""

    def __init__(self, emit: Listener) -> None:
        self._emit = emit
        self._open: dict[str, Logger] = {}

    def open(self, names: Sequence[str], opening: Opening) -> None:
        """Open loggers and return how to view each; a resumed run continues its logs."""
        for name in dict.fromkeys(names):
            chatter = io.StringIO()  # messages of the library would disturb the display
            try:
                with keeping_rng(), redirect_stdout(chatter), redirect_stderr(chatter):
                    self._open[name], place = OPENERS[name](opening)
            except Exception as error:
                self._drop(name, opening.done, error)
            else:
                self._emit(Note(f"Logging to {name}: {place}"))

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the record of an event. At a checkpoint, everything logged so far is flushed."""
        metrics = logged_metrics(record)
        if metrics:
            self._each(record["step"], lambda logger: logger.log_metrics(metrics, record["step"]))
        elif record["event"] == "checkpoint":
            self._each(record["step"], lambda logger: logger.save())

    def close(self, step: int, status: str) -> None:
        """Flush and close. `status` is Lightning's value: "success" or "failed"."""
        self._each(step, lambda logger: logger.finalize(status))
        self._open.clear()

    def _each(self, step: int, act: Callable[[Logger], None]) -> None:
        for name, logger in tuple(self._open.items()):
            try:
                with keeping_rng(), redirect_stdout(sys.stderr):  # stdout is for results
                    act(logger)
            except Exception as error:
                self._drop(name, step, error)

    def _drop(self, name: str, step: int, error: Exception) -> None:
        self._open.pop(name, None)
        self._emit(
            Note(
                f"step {step:,}: the {name} logger failed ({reason(error)}) and is left out; "
                "training continues"
            )
        )


def _csv(opening: Opening) -> Opened:
    """logs/csv/metrics.csv, rewritten from the records, because Lightning's logger cannot continue a file."""
    path = opening.folder / LOGS / "csv" / "metrics.csv"
    path.unlink(missing_ok=True)
    logger: Logger = CSVLogger(opening.folder, name=LOGS, version="csv", flush_logs_every_n_steps=FLUSH_EVERY)
    for record in opening.records:
        logger.log_metrics(logged_metrics(record), record["step"])
    logger.save()
    return logger, str(path)


def _tensorboard(opening: Opening) -> Opened:
    """logs/tensorboard; records of an earlier session after the resumed step are hidden."""
    logger = TensorBoardLogger(
        opening.folder,
        name=LOGS,
        version="tensorboard",
        default_hp_metric=False,
        purge_step=opening.done + 1 if opening.done else None,
        # The writer names files by second: two files of the same second would be one, and the first would be
        # overwritten.
        filename_suffix=f".{time.time_ns()}",
    )
    _ = logger.experiment  # otherwise created at the first use, which would hide a failure until then
    return logger, f"tensorboard --logdir {logger.log_dir}"


class _WandbLogger(WandbLogger):
    """Ends its run with the training instead of with the process."""

    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.experiment.finish(exit_code=0 if status == "success" else 1)


def _wandb(opening: Opening) -> Opened:
    """The project $WANDB_PROJECT or "smolctl"; the files and the run's id are in logs/.

    Neither the command line nor git's remote is recorded, because both may contain a token.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # no output over the display, no prompt for a key
    import wandb

    logs = opening.folder / LOGS
    logs.mkdir(exist_ok=True)
    id_file = opening.folder / WANDB_ID
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="ascii")
    settings = wandb.Settings(
        console="off", disable_git=True, disable_code=True, x_disable_meta=True, x_save_requirements=False
    )
    logger = _WandbLogger(
        name=opening.folder.resolve().name,
        save_dir=logs,
        version=id_file.read_text(encoding="ascii").strip(),
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        config=opening.config.model_dump(mode="json"),
        settings=settings,
    )
    return logger, logger.experiment.url or f"offline, in {logs}"


class TrackioLogger(Logger):
    """trackio as a Lightning logger, which Lightning lacks. Its database is in $TRACKIO_DIR."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        import trackio

        self._project = project
        self._trackio = trackio
        self._run = trackio.init(project=project, name=name, config=dict(config), resume="allow", embed=False)

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str:
        """The run's name inside the project."""
        return str(self._run.name)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log numbers at a step."""
        self._run.log(metrics, step=step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Does nothing: the config was passed to trackio at the start."""

    def finalize(self, status: str) -> None:
        """Send the remaining records and end the run."""
        self._trackio.finish()  # the run's own finish() would be called again when the process ends


def _trackio(opening: Opening) -> Opened:
    """A database in logs/trackio, unless $TRACKIO_DIR is set."""
    folder = os.environ.setdefault("TRACKIO_DIR", str((opening.folder / LOGS / "trackio").absolute()))
    config = opening.config.model_dump(mode="json")
    logger = TrackioLogger(PROJECT, opening.folder.resolve().name, config)
    return logger, f"TRACKIO_DIR={folder} trackio show --project {PROJECT}"


OPENERS: dict[str, Callable[[Opening], Opened]] = {
    "csv": _csv,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
