"""A run folder: `config.yaml`, `tokenizer/`, `checkpoints/step-000500.ckpt`, ..."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from smolctl.config import RunConfig
from smolctl.config.load import read_yaml, resolve_run_config
from smolctl.errors import InputError

RUNS = Path("runs")
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
CHECKPOINT_NAME = re.compile(r"step-(\d+)\.ckpt")


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint by its name; its content may still be damaged."""

    step: int
    path: Path
    problems: tuple[str, ...] = ()  # newer checkpoints that were passed over, and why


def split_step(reference: str) -> tuple[Path, int | None]:
    """`runs/NAME@STEP` as the run and the step; without `@STEP` the step is None.

    Raises:
        InputError: what follows the last `@` is no step.
    """
    run, at, step = reference.rpartition("@")
    if not at or Path(reference).exists():
        return Path(reference), None
    if not (step.isascii() and step.isdecimal()):
        raise InputError(
            f"{reference}: {step or 'nothing'} is no step", "Write RUN@STEP, such as runs/nano@500."
        )
    return Path(run), int(step)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run. Everything is read when asked, nothing is cached."""

    path: Path

    @staticmethod
    def is_run(path: Path) -> bool:
        """Whether a folder is a run: it has a config.yaml, and no Hugging Face config beside it."""
        return (path / CONFIG).is_file() and not (path / "config.json").exists()

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run in a folder; the link `runs/latest` is followed.

        Raises:
            InputError: there is no such folder, or it is no run.
        """
        if not path.is_dir():
            raise InputError(f"{path}: no such run", _runs_hint(path.parent))
        if not cls.is_run(path):
            raise InputError(f"{path}: not a run: it has no {CONFIG}", _runs_hint(path.parent))
        return cls(path.parent / path.readlink() if path.is_symlink() else path)

    def config(self) -> RunConfig:
        """The resolved config that the run was started with."""
        path = self.path / CONFIG
        return resolve_run_config(read_yaml(path), str(path))

    @property
    def tokenizer(self) -> Path:
        """Folder of the run's tokenizer."""
        return self.path / TOKENIZER

    def checkpoints(self) -> tuple[CheckpointFile, ...]:
        """Every checkpoint by rising step; files that are still being written are left out."""
        folder = self.path / CHECKPOINTS
        found = (
            CheckpointFile(int(match[1]), path)
            for path in (folder.iterdir() if folder.is_dir() else ())
            if path.is_file() and (match := CHECKPOINT_NAME.fullmatch(path.name))
        )
        return tuple(sorted(found, key=lambda file: file.step))

    def checkpoint(self, step: int | None = None) -> CheckpointFile:
        """The newest sound checkpoint, or the one of a step.

        Raises:
            InputError: there is none, none of that step, or it is damaged.
        """
        files = self.checkpoints()
        steps = ", ".join(str(file.step) for file in files)
        if not files:
            raise InputError(f"{self.path}: no checkpoint yet", "Train on, or name another run.")
        if step is not None:
            chosen = next((file for file in files if file.step == step), None)
            if chosen is None:
                raise InputError(f"{self.path}: no checkpoint of step {step}", f"There are: {steps}.")
            damage = damage_of(chosen.path)
            if damage:
                raise InputError(f"{chosen.path}: {damage}", self._sound_ones(files))
            return chosen
        problems: list[str] = []
        for file in reversed(files):
            damage = damage_of(file.path)
            if not damage:
                return replace(file, problems=tuple(problems))
            problems.append(f"{file.path.name} is passed over: {damage}")
        raise InputError(
            f"{self.path}: every checkpoint is damaged ({steps})", "Train again, or restore a copy."
        )

    def _sound_ones(self, files: tuple[CheckpointFile, ...]) -> str:
        sound = [str(file.step) for file in files if not damage_of(file.path)]
        return f"Good ones: step {', '.join(sound)}." if sound else "No other checkpoint is sound either."


def damage_of(path: Path) -> str:
    """What is structurally wrong with a checkpoint; "" when nothing is.

    A zip's directory stands at its end: a file that was cut off has none. Contents are not read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        size = path.stat().st_size if path.exists() else 0
        return f"damaged or cut off after {size:,} bytes ({error})"
    return (
        "" if any(name.endswith("/data.pkl") for name in names) else "not a PyTorch checkpoint (no data.pkl)"
    )


def latest_run(root: Path = RUNS) -> Path:
    """The run that `root/latest` points at, else the one that was written to last.

    Raises:
        InputError: there is no run.
    """
    link = root / "latest"
    if RunFolder.is_run(link):
        return RunFolder.open(link).path
    runs = [path for path in (root.iterdir() if root.is_dir() else ()) if RunFolder.is_run(path)]
    if not runs:
        raise InputError(f"{root}: no run here", "`smolctl train nano` makes one; or name a MODEL.")
    return max(runs, key=lambda path: (path / CONFIG).stat().st_mtime)


def _runs_hint(root: Path) -> str:
    runs = sorted(path.name for path in (root.iterdir() if root.is_dir() else ()) if RunFolder.is_run(path))
    return f"Runs in {root}: {', '.join(runs[:10])}." if runs else "`smolctl train nano` makes a run."
