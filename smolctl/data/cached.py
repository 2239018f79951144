"""The entries of the cache, their size, and how unused ones are deleted."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from smolctl.data.tokens.cache import MANIFEST, TOKENS, lock_of, remove_leftovers
from smolctl.durable import CHECKED, TOKENIZERS, cache_folder
from smolctl.errors import InputError
from smolctl.outside import checked, read_json

DAY = 24 * 60 * 60  # seconds


@dataclass(frozen=True)
class CacheEntry:
    """Tokens of a text, or a trained tokenizer."""

    path: Path
    content: str
    bytes: int
    used: float  # last time a command opened or wrote it: seconds since 1970


@dataclass(frozen=True)
class CacheReport:
    """The current state of the cache."""

    folder: Path
    entries: tuple[CacheEntry, ...]  # the least recently used first
    removed: tuple[CacheEntry, ...] = ()

    @property
    def bytes(self) -> int:
        """Total size of all entries."""
        return sum(entry.bytes for entry in self.entries)


class _Sources(TypedDict, total=False):
    """The relevant part of a manifest: the source or sources of a Hub dataset."""

    source: str
    sources: list[str]


def list_cache() -> CacheReport:
    """Report everything in the user's cache. Unfinished entries of killed processes are deleted."""
    folder = cache_folder()
    remove_leftovers(folder / TOKENS)
    kept = [path for path in (folder / TOKENS).glob("*") if path.is_dir() and path.suffix != ".partial"]
    found = [*_existing(kept, _tokens), *_existing((folder / TOKENIZERS).glob("*"), _tokenizer)]
    return CacheReport(folder, tuple(sorted(found, key=lambda entry: entry.used)))


def _existing(paths: Iterable[Path], describe: Callable[[Path], CacheEntry]) -> Iterator[CacheEntry]:
    """The entries, without those that another process is deleting or rebuilding."""
    for path in paths:
        with suppress(FileNotFoundError):
            yield describe(path)


def _tokenizer(path: Path) -> CacheEntry:
    return CacheEntry(path, "a trained tokenizer", path.stat().st_size, path.stat().st_mtime)


def prune_cache(days: float) -> CacheReport:
    """Delete entries that no command has used for this many days, except those that a process is writing."""
    before = list_cache()
    # 0 also deletes entries with a time in the future, as after the clock was set back.
    limit = time.time() - days * DAY if days else math.inf
    for marker in (before.folder / CHECKED).glob("*"):
        with suppress(OSError):
            if marker.stat().st_mtime <= limit:
                marker.unlink()
    for entry in before.entries:
        if entry.used > limit:
            continue
        with suppress(OSError):  # being written (Timeout), or not permitted: it is kept
            if entry.path.is_dir():
                with lock_of(entry.path).acquire(timeout=0):
                    shutil.rmtree(entry.path)
            else:
                entry.path.unlink()
    after = list_cache()
    paths = {entry.path for entry in after.entries}
    removed = tuple(entry for entry in before.entries if entry.path not in paths)
    return CacheReport(after.folder, after.entries, removed)


def _tokens(folder: Path) -> CacheEntry:
    files = [path for path in folder.rglob("*") if path.is_file()]
    manifests = [path for path in files if path.name == MANIFEST]
    content = "unreadable"
    with suppress(InputError, IndexError):
        said = checked(_Sources, read_json(manifests[0]), MANIFEST)
        content = f"tokens of {said.get('source') or ', '.join(said.get('sources', ()))}"
    used = max(path.stat().st_mtime for path in manifests or [folder])
    return CacheEntry(folder, content, sum(path.stat().st_size for path in files), used)
