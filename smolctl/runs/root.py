"""The folder `runs`: the runs in it, the next free name, and the link to the newest run."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from smolctl.errors import InputError
from smolctl.runs.layout import CONFIG, is_run

RUNS = Path("runs")
LATEST = "latest"  # in `runs`: a link to the newest run


def new_run(name: str) -> Path:
    """Create the next free folder runs/NAME-001."""
    for number in itertools.count(1):
        path = RUNS / f"{name}-{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue  # of an older run, or of one that is just starting
        return path
    raise AssertionError("unreachable")


def make_latest(run: Path) -> None:
    """Make runs/latest a link to a run, replacing an older link atomically.

    Raises:
        OSError: the working folder is not writable, its file system has no symbolic links, or runs/latest is
            a folder.
    """
    RUNS.mkdir(exist_ok=True)
    target = run.resolve()
    inside = target.parent == RUNS.resolve()
    partial = RUNS / f".{LATEST}.{os.getpid()}"
    partial.unlink(missing_ok=True)
    partial.symlink_to(target.name if inside else target, target_is_directory=True)
    try:
        partial.replace(RUNS / LATEST)
    finally:
        partial.unlink(missing_ok=True)


def require_run(path: Path) -> Path:
    """The folder of a run; the link `runs/latest` is followed.

    Raises:
        InputError: there is no such folder, or it is not a run.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such run", run_meant(str(path)) or _runs_hint(path.parent))
    if not is_run(path):
        raise InputError(f"{path}: not a run: it has no {CONFIG}", _runs_hint(path.parent))
    return path.parent / path.readlink() if path.is_symlink() else path


def latest_run(root: Path = RUNS) -> Path:
    """The run to which `root/latest` points, else the run that was written last.

    Raises:
        InputError: there is no run.
    """
    link = root / LATEST
    if is_run(link):
        return require_run(link)
    runs = _runs_in(root)
    if not runs:
        raise InputError(f"{root}: no run here", "`smolctl train nano` makes one; or name a MODEL.")
    return max(runs, key=lambda path: (path / CONFIG).stat().st_mtime)


def run_meant(name: str) -> str:
    """A hint where a run was named without its folder, as `nano-001` or `nano-001@300`; else no text."""
    return f"Did you mean {RUNS / name}?" if is_run(RUNS / (name.rpartition("@")[0] or name)) else ""


def _runs_in(root: Path) -> list[Path]:
    return [path for path in (root.iterdir() if root.is_dir() else ()) if is_run(path)]


def _runs_hint(root: Path) -> str:
    runs = sorted(path.name for path in _runs_in(root))
    return f"Runs in {root}: {', '.join(runs[:10])}." if runs else "`smolctl train nano` makes a run."
