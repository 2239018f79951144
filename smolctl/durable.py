"""Crash-safe files: written to a temporary name, synced, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from smolctl.errors import SmolError
from smolctl.escaping import json_text

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# A file that was written less than this many nanoseconds ago may change again without a new modification
# time.
SETTLED_NS = 3_000_000_000  # FAT has a resolution of two seconds
# Folders in the cache.
CHECKED, TOKENIZERS = "checked", "tokenizers"


class HashingFile:
    """A file opened for writing that hashes everything written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_digest(path: Path, expected: str) -> bool:
    """Whether a file's SHA-256 is the expected one. The file is read once for each identity."""
    return holds_once(path, f"sha256 {expected}", lambda: file_digest(path) == expected)


def holds_once(path: Path, claim: str, check: Callable[[], bool]) -> bool:
    """Whether a check of a file's content succeeds; a successful check is not repeated for the same file.

    A file counts as the same while its device, inode, size and modification time are unchanged. Successful
    checks are recorded in the user's cache, failed ones are not.

    Args:
        path: the file.
        claim: names the check.
        check: reads the file.
    """
    before = path.stat()
    identity = (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns)
    name = hashlib.sha256(f"{identity} {claim}".encode()).hexdigest()
    try:
        marker = cache_folder() / CHECKED / name
    except SmolError:  # there is no place for a record
        return check()
    if marker.exists():
        return True
    holds = check()
    if holds and time.time_ns() - before.st_mtime_ns > SETTLED_NS:
        with suppress(OSError):  # without a writable cache, the file is read again next time
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    return holds


def lack_of_room(folder: Path, needed: int) -> str:
    """The problem if a disk has no space for this many bytes under a folder; "" if they fit."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return ""
    unit, name = (1e6, "MB") if needed >= 1e7 else (1e3, "kB")
    return f"needs {needed / unit:,.0f} {name}, the disk has {free / unit:,.0f} {name} left"


def is_writable(path: Path) -> bool:
    """Whether files can be made in a folder, or a file can be written in place."""
    return os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0))


def require_writable(path: Path, remedy: str) -> None:
    """Check before slow work that a folder, or the nearest existing one above it, can be written. Nothing is
    created.

    Args:
        path: a folder that may be missing, or an existing file that is to be written in place.
        remedy: of the error.

    Raises:
        DiskError: it cannot be written.
    """
    absolute = path.absolute()
    existing = next(one for one in (absolute, *absolute.parents) if one.exists())
    if not is_writable(existing):
        is_read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        reason = os.strerror(errno.EROFS if is_read_only else errno.EACCES)
        raise DiskError(f"{existing}: cannot be written ({reason})", remedy)


@contextmanager
def folder_of(target: Path) -> Iterator[None]:
    """The folder of a file or folder that is written inside this context. Of the folders that it makes, those
    that are empty in the end are removed again."""
    made = [path for path in target.parents if not path.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


@contextmanager
def replacing(target: Path, concurrent: bool = False) -> Iterator[Path]:
    """A temporary path next to `target` to write a file to. It replaces `target` if nothing fails.

    Whenever the process dies, `target` is either the old file or the new one, complete and on the disk.

    Args:
        target: the final path.
        concurrent: whether several processes may write the same target at the same time; the last one wins.

    Raises:
        DiskError: another process is writing it, and `concurrent` is false.
    """
    process = f".{os.getpid()}" if concurrent else ""
    partial = target.with_name(f".{target.name}{process}.partial")
    if not concurrent:
        partial.touch()
    with nullcontext() if concurrent else writing_alone(partial, target):
        try:
            yield partial
            sync_file(partial)
            partial.replace(target)
            sync_folder(target.parent)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


@contextmanager
def writing_alone(path: Path, target: Path) -> Iterator[None]:
    """Hold the lock of a file or folder while it is written; it ends with the process. Where the file system
    has no locks, there is none.

    Args:
        path: must exist.
        target: what is written, for messages.

    Raises:
        DiskError: another process holds it, or has just finished.
    """
    import fcntl  # not on Windows

    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_alone = path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
        except BlockingIOError:
            is_alone = False
        except OSError:
            is_alone = True
        if not is_alone:
            raise DiskError(f"{target}: another process is writing it", "Wait for it, or write elsewhere.")
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for forked processes, which have inherited it
        os.close(descriptor)


def remove_partial(*folders: Path) -> None:
    """Delete temporary files that a killed process has left; no other process may be writing there."""
    for folder in folders:
        for path in folder.glob(".*.partial"):
            if path.is_file():
                path.unlink()


def write_text(target: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8 with its line ends unchanged."""
    with replacing(target, concurrent=True) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(target: Path, value: Any) -> None:
    """Write a value as JSON for people to read: indented, atomically, in UTF-8."""
    write_text(target, json_text(value, indent=2) + "\n")


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk, if its file system supports that."""
    with path.open("r+b") as file:  # Windows syncs only files opened for writing
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder survive a power failure, on systems that can sync a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cache_folder() -> Path:
    """The folder for cached tokens, tokenizers and file checks: `$SMOLCTL_CACHE` or `~/.cache/smolctl`.

    Raises:
        SmolError: it is in a home folder that is not known, as that of a user whom a container does not have.
    """
    path = named_path(os.environ.get("SMOLCTL_CACHE") or "~/.cache/smolctl")
    if path.parts[:1] and path.parts[0].startswith("~"):
        raise SmolError(f"{path}: the home folder is not known", "Set HOME, or SMOLCTL_CACHE to a folder.")
    return path


def named_path(name: str) -> Path:
    """The path that a user names, with `~` as the home folder, if that is known."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own fails for an unknown one


class DiskError(SmolError):
    """A file cannot be written."""


@contextmanager
def explaining_disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write to a run folder into an error with the reason and the remedy.

    Raises:
        DiskError: instead of the operating system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise DiskError(
            f"{error.filename or folder}: cannot be written ({error.strerror})",
            "Free some space or correct the permissions, then resume: the checkpoints are untouched.",
        ) from error
