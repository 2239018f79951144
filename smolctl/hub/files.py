"""Files that go up, with the checksums by which both sides know them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from smolctl.durable import file_digest


@dataclass(frozen=True)
class PlannedFile:
    """One file of the repository to be."""

    path: str  # in the repository
    local: Path
    bytes: int
    sha256: str
    git_sha1: str  # of git's blob, which the Hub gives for files that are not in LFS


def planned_files(folder: Path) -> tuple[PlannedFile, ...]:
    """Every file under a folder, by path."""
    return tuple(
        PlannedFile(
            path.relative_to(folder).as_posix(), path, path.stat().st_size, file_digest(path), _git_sha1(path)
        )
        for path in sorted(path for path in folder.rglob("*") if path.is_file())
    )


def _git_sha1(path: Path) -> str:
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: blob).hexdigest()
