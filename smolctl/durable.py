"""What files need that survive a crash and a full disk: room, checksums, bytes that are on the disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from smolctl.errors import SmolError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class HashingFile:
    """A file opened for writing that hashes what passes through."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lack_of_room(folder: Path, needed: int) -> str:
    """What is wrong with the disk under a folder for so many bytes; "" when they fit."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return ""
    return f"needs {needed / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB left"


def sync_file(path: Path) -> None:
    """Have a file's bytes on the disk before anything is built on them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename durable. Where folders cannot be synced (Windows) the rename has to do."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where tokens and tokenizers are kept for the next run: `$SMOLCTL_CACHE`, or `~/.cache/smolctl`."""
    named = os.environ.get("SMOLCTL_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "smolctl"


class DiskError(SmolError):
    """A file of the run cannot be written."""


@contextmanager
def naming_the_disk(folder: Path) -> Iterator[None]:
    """Turn a failed write into a run folder into the reason and the remedy.

    Raises:
        DiskError: in place of the operating system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise DiskError(
            f"{error.filename or folder}: cannot be written ({error.strerror})",
            "Free some space or mend the rights, then resume: the checkpoints are untouched.",
        ) from error
