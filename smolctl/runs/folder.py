"""A run folder: how its files are read, written, branched and continued. `layout` says what lies where."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolctl.config import RunConfig
from smolctl.config.dump import to_yaml
from smolctl.config.load import read_yaml, resolve_run_config
from smolctl.durable import (
    explaining_disk_errors,
    file_digest,
    remove_partial,
    replacing,
    require_writable,
    write_json,
    write_text,
)
from smolctl.errors import InputError, UsageError
from smolctl.ownership import (
    Record,
    edited_files,
    kept_files,
    read_record,
    remove_own_files,
    require_replaceable,
    write_record,
)
from smolctl.runs.checkpoint_file import (
    CheckpointFile,
    is_recorded_alike,
    link_checkpoint,
    rename_checkpoint,
    write_checksum,
)
from smolctl.runs.environment import read_environment, read_if_sound, update_environment, write_environment
from smolctl.runs.events import Event, Listener, Note, Prediction, Step, Validation, to_json
from smolctl.runs.layout import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    FILES,
    FINAL,
    KIND,
    LINEAGE,
    LOCK,
    LOSS_CURVE,
    METRICS,
    PREDICTIONS,
    PREDICTIONS_PAGE,
    REPORT,
    TOKENIZER,
    checkpoint_name,
    is_run,
    step_in_name,
)
from smolctl.runs.prediction_history import History, histories, to_markdown
from smolctl.runs.records import (
    EVERY_STEP,
    StepRecord,
    ValidationRecord,
    append_record,
    best_validation,
    keep_records,
    read_records,
)
from smolctl.runs.root import RUNS, new_run, require_run


@dataclass(frozen=True)
class RunFolder:
    """The files of one run. They are read on request; nothing is cached in memory."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run in a folder; the link `runs/latest` is followed.

        Raises:
            InputError: there is no such folder, or it is not a run.
        """
        return cls(require_run(path))

    @classmethod
    def around(cls, checkpoint: Path) -> RunFolder | None:
        """The run that a checkpoint file belongs to; None for a file that was moved out of its run."""
        folder = checkpoint.absolute().parent
        is_inside = folder.name == CHECKPOINTS and is_run(folder.parent)
        return cls(checkpoint.parent.parent) if is_inside else None

    @classmethod
    def claim(
        cls, name: str, out: Path | None, force: bool, reads: Iterable[str], emit: Listener
    ) -> RunFolder:
        """Create a new folder for a run: `out`, or the next free runs/NAME-001.

        Args:
            name: of the config.
            out: the folder named by the user.
            force: replace the run in it; files that are not smolctl's are kept.
            reads: files, folders and runs that the command reads.
            emit: called with a note on files that are kept.

        Raises:
            UsageError: `out` contains something that must not be replaced.
            InputError: another process is training in it.
        """
        if out is None:
            folder = new_run(name)
        else:
            cls.require_free(out, force, reads)
            folder = out.resolve() if out.is_symlink() else out
            folder.mkdir(parents=True, exist_ok=True)
            if read_record(folder) is not None:
                with cls(folder).lock(emit):
                    if stays := remove_own_files(folder):
                        emit(Note(kept_files(out, stays)))
        write_record(folder, Record(KIND, dict.fromkeys(FILES)))
        return cls(folder)

    @classmethod
    def require_free(cls, out: Path | None, force: bool, reads: Iterable[str]) -> None:
        """Refuse a folder that `claim` would refuse. Arguments and errors are the same."""
        if out is None:
            require_writable(RUNS, "Name another folder with --out, or change to one that can be written.")
            return
        require_replaceable(out, KIND, "--out", force, reads, is_moved=False)

    def lock(self, emit: Listener) -> AbstractContextManager[object]:
        """The lock of the folder, held while a process trains in it.

        The process that holds it deletes unfinished files of killed processes.

        Args:
            emit: called with a note if the file system has no locks; then the run continues without one.

        Raises:
            InputError: another process holds it.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            with explaining_disk_errors(self.path):
                lock.acquire()
        except NotImplementedError:
            emit(
                Note(
                    f"{self.path}: this disk has no file locks: do not train into this folder from two "
                    "processes at once."
                )
            )
            return nullcontext()
        except Timeout:
            raise InputError(
                f"{self.path}: another process is training this run",
                "Wait for it, or start a run of your own with --out.",
            ) from None
        remove_partial(self.path, self.path / CHECKPOINTS, self.tokenizer)
        return lock

    # Description of the run

    def describe(
        self, config: RunConfig, environment: Mapping[str, Any], save_tokenizer: Callable[[Path], None]
    ) -> None:
        """Write the description of a run before its first step.

        Args:
            config: of the run.
            environment: the machine, the versions, and the settings chosen for them.
            save_tokenizer: writes the tokenizer into a folder.

        Raises:
            UsageError: another process has just started a run in this folder.
        """
        if is_run(self.path):
            raise UsageError(
                f"{self.path}: another process has just started a run there", "Choose another --out."
            )
        self.write_config(config)
        write_environment(self.path / ENVIRONMENT, environment)
        save_tokenizer(self.tokenizer)
        (self.path / CHECKPOINTS).mkdir(exist_ok=True)

    def config(self) -> RunConfig:
        """The resolved config with which the run was started."""
        path = self.path / CONFIG
        return resolve_run_config(read_yaml(path), str(path))

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved config, and record its checksum."""
        write_text(self.path / CONFIG, to_yaml(config))
        record = read_record(self.path) or Record(KIND, dict.fromkeys(FILES))
        digests = {**record.files, CONFIG: file_digest(self.path / CONFIG)}
        write_record(self.path, replace(record, files=digests))

    def config_sha256(self) -> str:
        """The SHA-256 of the current config.yaml."""
        return file_digest(self.path / CONFIG)

    def edited_config(self) -> RunConfig | None:
        """The content of config.yaml, if somebody may have edited it after smolctl wrote it.

        Raises:
            InputError: it is no longer a valid config.
        """
        is_as_written = read_record(self.path) is not None and CONFIG not in edited_files(self.path)
        return None if is_as_written else self.config()

    def environment(self) -> dict[str, Any]:
        """The machine, the versions, and the settings chosen for them; empty if not recorded."""
        return read_environment(self.path / ENVIRONMENT)

    def update_environment(self, environment: Mapping[str, Any]) -> None:
        """Record that the run continues on another machine or with other settings; the earlier record is
        kept in `earlier`.
        """
        update_environment(self.path / ENVIRONMENT, environment)

    @property
    def tokenizer(self) -> Path:
        """Folder of the run's tokenizer."""
        return self.path / TOKENIZER

    # Checkpoints

    def checkpoint_path(self, step: int) -> Path:
        """The path of a step's checkpoint, whether it exists or not."""
        return self.path / CHECKPOINTS / checkpoint_name(step)

    def checkpoints(self) -> tuple[CheckpointFile, ...]:
        """All checkpoints in order of steps, without files that are still being written.

        The last one is final.ckpt if somebody has deleted the file with its step's name.
        """
        folder = self.path / CHECKPOINTS
        found = [
            CheckpointFile(step, path)
            for path in (folder.iterdir() if folder.is_dir() else ())
            if path.is_file() and (step := step_in_name(path)) is not None
        ]
        final = folder / FINAL
        if final.is_file() and not any(is_recorded_alike(final, file.path) for file in found):
            last = max((record["step"] for record in self.metrics()), default=0)
            if last and all(file.step != last for file in found):
                found.append(CheckpointFile(last, final))
        return tuple(sorted(found, key=lambda file: file.step))

    def under_its_step(self, file: CheckpointFile) -> CheckpointFile:
        """A checkpoint under its step's name instead of final.ckpt."""
        path = self.checkpoint_path(file.step)
        if file.path.name == FINAL and not path.exists():
            rename_checkpoint(file.path, path)
        return CheckpointFile(file.step, path)

    def checkpoint(self, step: int | None = None) -> CheckpointFile:
        """The newest checkpoint, or that of a step, if it is intact.

        Raises:
            InputError: there is none, none of that step, or it is damaged; names the newest intact one.
        """
        files = self.checkpoints()
        if not files:
            raise InputError(
                f"{self.path}: no checkpoint yet: training ended before it saved one, or is about to",
                f"Start the run again: smolctl train {self.path / CONFIG}. Or name another run.",
            )
        chosen = files[-1] if step is None else next((file for file in files if file.step == step), None)
        if chosen is None:
            steps = ", ".join(str(file.step) for file in files)
            raise InputError(f"{self.path}: no checkpoint of step {step}", f"There are: {steps}.")
        if damage := chosen.damage:
            good = self.newest_sound(but=chosen.path)
            none = "No other checkpoint is intact."
            instead = f"The newest intact one: {self.path}@{good.step}" if good else none
            raise InputError(f"{chosen.path}: {damage}", instead)
        return chosen

    def newest_sound(self, but: Path) -> CheckpointFile | None:
        """The newest intact checkpoint, except one; None if there is none."""
        others = (file for file in reversed(self.checkpoints()) if file.path.name != but.name)
        return next((file for file in others if not file.damage), None)

    def best_step(self) -> int:
        """The step of the checkpoint with the best score on the held-out text, as recorded by its validation.

        Raises:
            InputError: no existing checkpoint was validated.
        """
        best = self.best_validation({file.step for file in self.checkpoints()})
        if best is None:
            raise InputError(
                f"{self.path}: none of its checkpoints was scored on held-out text, so there is no best one",
                "Name a step, RUN@STEP; validation.every says how often a run is scored.",
            )
        return best["step"]

    def name_final(self, step: int) -> None:
        """Give the checkpoint of the last step the additional name final.ckpt."""
        link_checkpoint(self.checkpoint_path(step), self.path / CHECKPOINTS / FINAL)

    # Records

    def record(self, event: Event) -> None:
        """Append an event to its file."""
        if isinstance(event, Step | Validation):
            append_record(self.path / METRICS, to_json(event))
        elif isinstance(event, Prediction):
            append_record(self.path / PREDICTIONS, to_json(event))

    def metrics(self, last: int = EVERY_STEP) -> Iterator[Mapping[str, Any]]:
        """The records of metrics.jsonl up to step `last`, each a `StepRecord` or a `ValidationRecord`."""
        either: Any = StepRecord | ValidationRecord
        return read_records(self.path / METRICS, either, last)

    def best_validation(self, steps: Container[int] | None = None) -> ValidationRecord | None:
        """See `records.best_validation`."""
        return best_validation(read_records(self.path / METRICS, ValidationRecord), steps)

    def predictions(self, last: int = EVERY_STEP) -> dict[str, History]:
        """The predictions of the run up to step `last`, by prompt."""
        return histories(read_records(self.path / PREDICTIONS, Prediction, last))

    def write_predictions(self) -> None:
        """Rewrite predictions.md from predictions.jsonl."""
        write_text(self.path / PREDICTIONS_PAGE, to_markdown(self.predictions()))

    def draw_loss(self) -> None:
        """Redraw loss.png from metrics.jsonl."""
        from smolctl.runs.chart import draw_loss

        with replacing(self.path / LOSS_CURVE) as partial:
            draw_loss(self.metrics(), partial)

    def write_report(self) -> None:
        """Rewrite report.html from the run's config and records."""
        from smolctl.runs.report import to_html

        name, config, environment = self.path.resolve().name, self.config(), self.environment()
        write_text(self.path / REPORT, to_html(name, config, self.metrics(), self.predictions(), environment))

    def keep_records(self, step: int, parent: RunFolder | None = None) -> None:
        """Keep the records up to a step, of this run or of its parent; later steps will be repeated."""
        last = step or -1  # a run that continues from step 0 predicts there again
        for name in (METRICS, PREDICTIONS):
            keep_records((parent or self).path / name, last, self.path / name)
        if (self.path / PREDICTIONS).is_file():
            self.write_predictions()

    # Lineage

    def branch_from(self, checkpoint: Path, step: int, parent: RunFolder | None) -> None:
        """Start with a copy of a checkpoint and, from a parent run, the records up to its step.

        Args:
            checkpoint: the file to continue from.
            step: its step.
            parent: its run; None for a file that was moved out of its run.
        """
        copy, digest = self.checkpoint_path(step), file_digest(checkpoint)
        with replacing(copy) as partial:
            shutil.copyfile(checkpoint, partial)
        write_checksum(copy, digest)
        if parent is not None:
            self.keep_records(step, parent)
        lineage = {
            "parent": str(parent.path if parent else checkpoint),
            "step": step,
            "checkpoint_sha256": digest,
            "parent_lineage": (read_if_sound(parent.path / LINEAGE) or None) if parent else None,
        }
        write_json(self.path / LINEAGE, lineage)
