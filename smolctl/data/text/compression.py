"""The bytes of a file, decompressed by its suffix: .gz, .xz, .bz2, .zst, or unchanged."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, Protocol

from smolctl.errors import InputError
from smolctl.extras import missing_package

# Formats of the standard library: the message for a damaged file, and the function that opens one.
_STANDARD: Mapping[str, tuple[str, Callable[[BinaryIO], IO[bytes] | gzip.GzipFile]]] = {
    "gz": ("gzip", gzip.open),
    "xz": ("xz", lzma.open),
    "bz2": ("bzip2", bz2.open),
}
ENDINGS = (*_STANDARD, "zst")
_CHUNK = 1024 * 1024  # bytes read at once
_PACKED_CHUNK = 64 * 1024  # for a zstd file, which may decompress to a thousand times as much


class _Frame(Protocol):
    """One zstd frame; a file may contain several, one after another."""

    def decompress(self, data: bytes, /) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


@contextmanager
def open_chunks(path: Path) -> Iterator[tuple[Iterator[bytes], Callable[[], int]]]:
    """The content of a file in chunks, with the number of bytes read from the file so far.

    Raises:
        InputError: the file is damaged, cannot be read, changes while it is read, or needs a package that is
            not installed.
    """
    try:
        with path.open("rb") as raw:
            yield _unchanged(path, raw), raw.tell
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{path}: cannot be read ({reason})", "Check the file and its permissions."
        ) from None


def _unchanged(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """The chunks of a file, whose end is not awaited while another process writes it."""
    before = os.fstat(raw.fileno())
    for chunk in _chunks(path, raw):
        if raw.tell() > before.st_size:
            break
        yield chunk
    require_same(path, before, os.fstat(raw.fileno()))


def require_same(path: Path, before: os.stat_result, after: os.stat_result) -> None:
    """Refuse a file that was written while it was read: its parts may not belong together.

    Raises:
        InputError: its size or its modification time has changed.
    """
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(
            f"{path}: changed while it was read", "Run again when no other program is writing to it."
        )


def _chunks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    ending = path.suffix.lower().removeprefix(".")
    if ending in _STANDARD:
        yield from _standard_chunks(path, raw, *_STANDARD[ending])
    elif ending == "zst":
        yield from _zstd_chunks(path, raw)
    else:
        yield from iter(lambda: raw.read(_CHUNK), b"")


def _standard_chunks(
    path: Path, raw: BinaryIO, kind: str, unpack: Callable[[BinaryIO], IO[bytes] | gzip.GzipFile]
) -> Iterator[bytes]:
    try:
        with unpack(raw) as unpacked:
            yield from iter(lambda: unpacked.read(_CHUNK), b"")
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, kind, error) from None
    except OSError as error:  # an error of the disk has a number; those of gzip and bz2 do not
        if error.errno is not None:
            raise
        raise _damaged(path, kind, error) from None


def _zstd_chunks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    new_frame, failure = _zstd(path)
    frame: _Frame | None = None  # the current one
    try:
        for packed in iter(lambda: raw.read(_PACKED_CHUNK), b""):
            rest = packed
            while rest:
                frame = frame or new_frame()
                if unpacked := frame.decompress(rest):
                    yield unpacked
                rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except failure as error:
        raise _damaged(path, "zstd", error) from None
    if frame is not None:
        raise _damaged(path, "zstd", "it ends within a frame")


def _zstd(path: Path) -> tuple[Callable[[], _Frame], type[Exception]]:
    """The decompressor of a frame, and its exception: Python's own from 3.14 on, else the package's."""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        pass
    else:
        return zstd.ZstdDecompressor, zstd.ZstdError
    try:
        import zstandard
    except ImportError:
        raise missing_package("zstandard", "data", str(path)) from None
    return zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError


def _damaged(path: Path, kind: str, reason: object) -> InputError:
    return InputError(f"{path}: damaged {kind} file ({reason})", "Fetch or compress the file again.")
