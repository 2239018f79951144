"""Files to upload, with the checksums that identify them on both sides."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from smolctl.durable import file_digest

README = "README.md"  # the card of a model or of a Space


@dataclass(frozen=True)
class PlannedFile:
    """One file of the planned repository."""

    path: str  # in the repository
    local: Path
    bytes: int
    sha256: str
    git_sha1: str  # of git's blob, which the Hub reports for files that are not in LFS


def planned_files(folder: Path) -> tuple[PlannedFile, ...]:
    """Every file under a folder, by path; links do not count."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return tuple(planned_file(folder, path.relative_to(folder).as_posix()) for path in files)


def planned_file(folder: Path, path: str) -> PlannedFile:
    """A file under a folder."""
    local = folder / path
    return PlannedFile(path, local, local.stat().st_size, file_digest(local), _git_sha1(local))


def _git_sha1(path: Path) -> str:
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: blob).hexdigest()
