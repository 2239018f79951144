"""The writing side of a run folder: its config, its records and its charts."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from smolctl import __version__
from smolctl.config import RunConfig
from smolctl.config.dump import to_yaml
from smolctl.durable import naming_the_disk
from smolctl.errors import InputError, UsageError
from smolctl.escaping import json_line
from smolctl.runs.chart import draw_loss
from smolctl.runs.events import Event, Prediction, Step, Validation, to_json
from smolctl.runs.folder import RUNS, RunFolder
from smolctl.runs.story import History, histories, to_markdown

RECORDED_PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "numpy", "safetensors")
METRICS = "metrics.jsonl"
PREDICTIONS = "predictions.jsonl"
STORY = "predictions.md"
LOSS_CURVE = "loss.png"


def claim_run_folder(name: str, out: Path | None, force: bool) -> Path:
    """A fresh folder for a run: `out`, or the next free runs/NAME-001.

    Raises:
        UsageError: `out` holds something already and `force` is not set.
        InputError: another process is training into it.
    """
    if out is None:
        return _next_free(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not force:
            raise UsageError(
                f"{out} is not empty", "Choose another --out, resume it, or replace it with --force."
            )
        if not RunFolder.is_run(out):
            raise UsageError(
                f"{out} is no run of smolctl: --force will not delete it", "Choose another --out."
            )
        with RunRecorder(out).lock():
            shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _next_free(name: str) -> Path:
    for number in itertools.count(1):
        path = RUNS / f"{name}-{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue  # of an older run, or of one that starts at this very moment
        return path
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class RunRecorder:
    """Writes what happens into a run folder. One line an event, flushed at once."""

    folder: Path

    def lock(self) -> FileLock:
        """The lock of the folder, held while a process trains into it.

        Raises:
            InputError: another process holds it.
        """
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            with naming_the_disk(self.folder):
                lock.acquire()
        except Timeout:
            raise InputError(
                f"{self.folder}: another process is training into this run",
                "Wait for it, or start a run of your own with --out.",
            ) from None
        return lock

    def describe(self, config: RunConfig, save_tokenizer: Callable[[Path], None]) -> None:
        """Write config.yaml, environment.json and the tokenizer, and point runs/latest here.

        Args:
            config: of the run.
            save_tokenizer: writes the tokenizer into a folder.

        Raises:
            UsageError: another process was faster to make a run of this folder.
        """
        if RunFolder.is_run(self.folder):
            raise UsageError(f"{self.folder} has become a run by now", "Choose another --out.")
        self.write_config(config)
        environment = json.dumps(_environment(), indent=2)
        (self.folder / "environment.json").write_text(environment + "\n", encoding="utf-8")
        save_tokenizer(RunFolder(self.folder).tokenizer)
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        point_latest_at(self.folder)

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved config."""
        partial = self.folder / ".config.yaml.partial"
        partial.write_text(to_yaml(config), encoding="utf-8")
        partial.replace(self.folder / "config.yaml")

    def record(self, event: Event) -> None:
        """Append an event to the file it belongs to."""
        if isinstance(event, Step | Validation):
            self._append(METRICS, to_json(event))
        elif isinstance(event, Prediction):
            self._append(PREDICTIONS, to_json(event))

    def forget_after(self, step: int) -> None:
        """Drop records of steps that a resumed run is going to do again."""
        last = step or -1  # a run that goes on from step 0 predicts there once more
        for name in (METRICS, PREDICTIONS):
            if (self.folder / name).exists():
                kept = [line for line in self._lines(name) if _step_of(line) <= last]
                self._replace(name, "".join(f"{line}\n" for line in kept))
        if (self.folder / PREDICTIONS).exists():
            self.write_story()

    def copy_records(self, parent: Path, step: int) -> None:
        """Begin with the records of another run up to a step."""
        for name in (METRICS, PREDICTIONS):
            if (parent / name).exists():
                shutil.copyfile(parent / name, self.folder / name)
        self.forget_after(step)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Every record of metrics.jsonl; a line cut off by a crash is left out."""
        return self._records(METRICS)

    def predictions(self) -> dict[str, History]:
        """Every prediction of the run, by prompt."""
        return histories(self._records(PREDICTIONS))

    def write_story(self) -> None:
        """Write predictions.md anew from predictions.jsonl."""
        self._replace(STORY, to_markdown(self.predictions()))

    def draw_loss(self) -> None:
        """Draw loss.png anew from metrics.jsonl."""
        partial = self.folder / f".{LOSS_CURVE}.partial"
        draw_loss(self.metrics(), partial)
        partial.replace(self.folder / LOSS_CURVE)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json_line(record) + "\n")

    def _lines(self, name: str) -> Iterator[str]:
        path = self.folder / name
        if path.exists():
            with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                for line in file:
                    yield line.rstrip("\n")

    def _records(self, name: str) -> Iterator[dict[str, Any]]:
        return (json.loads(line) for line in self._lines(name) if _step_of(line) < _NEVER)

    def _replace(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        partial = self.folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(self.folder / name)


_NEVER = 1 << 62


def _step_of(line: str) -> int:
    """The step of a record; a line cut off by a crash lies after every step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return _NEVER


def point_latest_at(folder: Path) -> None:
    """Make runs/latest a link to a run, replacing an older link in one move."""
    root = Path("runs")
    root.mkdir(exist_ok=True)
    inside = folder.resolve().parent == root.resolve()
    partial = root / f".latest.{os.getpid()}"
    partial.unlink(missing_ok=True)
    partial.symlink_to(folder.name if inside else folder.resolve(), target_is_directory=True)
    partial.replace(root / "latest")


def _environment() -> dict[str, Any]:
    import torch

    packages: dict[str, str | None] = {}
    for package in RECORDED_PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "smolctl": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
