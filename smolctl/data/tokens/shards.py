"""Tokens on disk: flat files of integers, written once and then read at any position."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from smolctl.data.tokens.marks import IDS
from smolctl.durable import DiskError, holds_once, sync_file
from smolctl.errors import InputError

SHARD_BYTES = 256 * 1024 * 1024
_READ_AT_ONCE = 16 * 1024 * 1024  # bytes; a multiple of every token size
# Kept free for other programs, and for the checkpoints of the run itself.
RESERVE_BYTES = 64 * 1024 * 1024


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Two bytes per token if they suffice, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class Shard:
    """One file of tokens in the manifest."""

    file: str
    tokens: int
    sha256: str


def find_shard_damage(path: Path, shard: Shard, dtype: np.dtype[np.unsignedinteger], vocab_size: int) -> str:
    """Why a file of tokens must not be used; "" if it is as written, and all ids are in the vocabulary.

    The file is read once for each identity (`durable.holds_once`).

    Raises:
        OSError: the file cannot be read.
    """
    size, expected = path.stat().st_size, shard.tokens * dtype.itemsize
    if size != expected:
        return f"{path.name} has {size:,} bytes instead of {expected:,}"
    claim = f"sha256 {shard.sha256}, ids below {vocab_size:,} in {dtype.str}"
    if holds_once(path, claim, lambda: _holds(path, shard.sha256, dtype, vocab_size)):
        return ""
    return f"the bytes of {path.name} are not the ones that were written"


def _holds(path: Path, sha256: str, dtype: np.dtype[np.unsignedinteger], vocab_size: int) -> bool:
    digest, largest = hashlib.sha256(), 0
    ids = dtype.type(IDS % 2 ** (8 * dtype.itemsize))  # without the marks of conversations
    with path.open("rb") as file:
        for data in iter(lambda: file.read(_READ_AT_ONCE), b""):
            digest.update(data)
            largest = max(largest, int((np.frombuffer(data, dtype) & ids).max()))
    return digest.hexdigest() == sha256 and largest < vocab_size


class ShardWriter:
    """Appends tokens to files of at most `shard_bytes`: NAME-00000.bin, NAME-00001.bin, ...

    Raises:
        DiskError: the disk is full, or would be.
    """

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype[np.unsignedinteger], shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.tokens = 0
        self._folder, self._name, self._dtype = folder, name, dtype
        self._tokens_a_shard = max(1, shard_bytes // dtype.itemsize)
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._in_shard = 0
        self._hash = hashlib.sha256()

    def append(self, ids: Sequence[int] | NDArray[np.integer]) -> None:
        """Write ids (N,), each below the vocabulary size for which the dtype was chosen."""
        array = np.asarray(ids, self._dtype)
        require_space(self._folder, array.nbytes)
        while len(array):
            part = array[: self._tokens_a_shard - self._in_shard]
            self._write(part)
            array = array[len(part) :]

    def _write(self, part: NDArray[np.unsignedinteger]) -> None:
        data = part.tobytes()
        with disk_errors(self._folder):
            if self._file is None:
                self._file = (self._folder / self._next_name()).open("xb")
            self._file.write(data)
        self._hash.update(data)
        self._in_shard += len(part)
        self.tokens += len(part)
        if self._in_shard == self._tokens_a_shard:
            self._end_shard()

    def _next_name(self) -> str:
        return f"{self._name}-{len(self._shards):05d}.bin"

    def _end_shard(self) -> None:
        if self._file is None:
            return
        with disk_errors(self._folder):
            self._file.close()
            sync_file(self._folder / self._next_name())
        self._shards.append(Shard(self._next_name(), self._in_shard, self._hash.hexdigest()))
        self._file, self._in_shard, self._hash = None, 0, hashlib.sha256()

    def finish(self) -> tuple[Shard, ...]:
        """Sync everything to the disk; returns the shards written."""
        self._end_shard()
        return tuple(self._shards)

    def close(self) -> None:
        """Close an unfinished file, whose data no longer matters."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()


def require_space(folder: Path, size: int) -> None:
    """Check that `size` more bytes fit.

    Raises:
        DiskError: they do not; names the free space.
    """
    free = shutil.disk_usage(folder).free
    if free < size + RESERVE_BYTES:
        raise _disk_full(folder, free)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write into an error message.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(folder, shutil.disk_usage(folder).free) from None
        raise DiskError(
            f"{folder}: cannot be written ({error.strerror or error})", "Set SMOLCTL_CACHE to another folder."
        ) from None


def _disk_full(folder: Path, free: int) -> DiskError:
    return DiskError(
        f"{folder}: the disk is full ({free / 1e6:,.0f} MB free) while the corpus is tokenized",
        "Make room, or set SMOLCTL_CACHE to a folder on another disk.",
    )


class TokenStream:
    """A range of tokens in consecutive shards, which are opened when first read.

    Files are read, not mapped: a mapped file that somebody truncates ends the process without a message. The
    stream can be pickled: a worker process opens the files itself.

    Args:
        files: path of every shard with its number of tokens.
        dtype: of the files.
        start: first token of the range.
        length: tokens of the range.
    """

    def __init__(
        self, files: Sequence[tuple[Path, int]], dtype: np.dtype[np.unsignedinteger], start: int, length: int
    ) -> None:
        self._paths = [path for path, _ in files]
        self._ends = np.cumsum([tokens for _, tokens in files], dtype=np.int64)
        self._dtype, self._start, self._length = dtype, start, length
        self._descriptors: dict[int, int] = {}

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptors": {}}

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens `start` to `start + length`: (length,).

        Raises:
            IndexError: the range is not within the stream.
            InputError: a file has become shorter.
        """
        if start < 0 or length < 0 or start + length > self._length:
            raise IndexError(f"tokens {start} to {start + length} of {self._length}")
        out = np.empty(length, np.int64)
        position, filled = self._start + start, 0
        shard = int(np.searchsorted(self._ends, position, side="right"))
        while filled < length:
            begin = int(self._ends[shard - 1]) if shard else 0
            end = min(int(self._ends[shard]), position + length - filled)
            part = self._read(shard, position - begin, end - position)
            out[filled : filled + len(part)] = part
            position, filled, shard = position + len(part), filled + len(part), shard + 1
        return out

    def places_of(self, token: int) -> NDArray[np.int64]:
        """Positions of a token, in ascending order: (n,)."""
        size = _READ_AT_ONCE // np.dtype(np.int64).itemsize
        starts = range(0, self._length, size)
        found = [
            start + np.flatnonzero(self.read(start, min(size, self._length - start)) == token)
            for start in starts
        ]
        return np.concatenate([np.empty(0, np.int64), *found])

    def _read(self, shard: int, start: int, length: int) -> NDArray[np.unsignedinteger]:
        """Tokens within a shard: (length,)."""
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self._paths[shard], os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptors[shard])
        size = self._dtype.itemsize
        data = os.pread(self._descriptors[shard], length * size, start * size)
        if len(data) < length * size:
            raise InputError(
                f"{self._paths[shard]}: was shortened while it was in use",
                "Resume the run, or repeat the command: the text is tokenized again.",
            )
        return np.frombuffer(data, self._dtype)
