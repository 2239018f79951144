"""Files that go up, with the checksums by which both sides know them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20


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
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(_planned(path, path.relative_to(folder).as_posix()) for path in paths)


def _planned(local: Path, path: str) -> PlannedFile:
    size = local.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with local.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            sha1.update(chunk)
    return PlannedFile(path, local, size, sha256.hexdigest(), sha1.hexdigest())
