"""What is kept of a corpus's tokens: its parts, and folders that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from smolctl.config.run import DataConfig
from smolctl.data.mixture import Mixture
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokens.encoding import TokenizeProgress
from smolctl.data.tokens.shards import Shard, disk_errors
from smolctl.durable import sync_folder, write_text

FORMAT = 1  # of the folders; an older one is never read
MANIFEST = "manifest.json"
OnProgress = Callable[[TokenizeProgress], None]


@dataclass(frozen=True)
class TokenizedCorpus:
    """Tokens to train on and tokens to validate on.

    Attributes:
        folders: the shards and their manifests, of each part.
        fingerprint: SHA-256 that identifies the training tokens and their order. It stays the same when
            more of a Hub dataset is streamed.
        train: tokens to train on; every document ends with the end-of-text token.
        validation: tokens held out, or None. Of a mixture: of each source, by its share.
        documents: texts in both.
        tokens: in both.
        bytes: of UTF-8 text in both.
        notes: what the user should know about them.
    """

    folders: tuple[Path, ...]
    fingerprint: str
    train: Mixture
    validation: Mixture | None
    documents: int
    tokens: int
    bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says of a folder; its writers add what they were made from."""

    tokenizer: str  # sha256
    dtype: str
    documents: int
    tokens: int
    bytes: int
    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]


def digest(parts: object) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def folder_of(cache: Path, made_from: list[Any], data: DataConfig, tokenizer: Tokenizer) -> Path:
    """Where a result is kept: under a name that changes with everything that changes the result."""
    parts = [
        *made_from,
        [tokenizer.sha256, tokenizer.end_of_text_id],
        [data.validation_fraction, data.seed, data.text_field],
    ]
    return cache / "tokens" / digest(parts)[:32]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time builds a folder; the others wait for it.

    Raises:
        InputError: the cache cannot be written.
    """
    lock = FileLock(f"{folder}.lock")
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def whole_or_absent(folder: Path) -> Iterator[Path]:
    """A new folder beside its place, moved there in one step when nothing went wrong. The lock is held.

    Leftovers of a process that was killed, and a damaged folder in its place, are removed before.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f"{folder.name}-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}-{secrets.token_hex(4)}.partial")
    try:
        with disk_errors(folder.parent):
            partial.mkdir()
        yield partial
        with disk_errors(folder.parent):
            partial.rename(folder)
            sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Say what a folder holds. Raises InputError as `disk_errors` does."""
    with disk_errors(folder):
        write_text(folder / MANIFEST, json.dumps(asdict(manifest) | {"format": FORMAT}, indent=2))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `write_manifest` said, or None when nothing is there or the shards do not agree with it.

    The lists `train` and `held_out` come back as tuples of `Shard`.
    """
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if content.pop("format") != FORMAT:
            return None
        width = np.dtype(content["dtype"]).itemsize
        for part in ("train", "held_out"):
            content[part] = tuple(Shard(**shard) for shard in content[part])
            if any((folder / shard.file).stat().st_size != shard.tokens * width for shard in content[part]):
                return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return content


def held_out_rule(data: DataConfig) -> Callable[[int], bool]:
    """A share of the documents, chosen by a hash of the seed and the document's number."""
    key = data.seed.to_bytes(8, "little")
    limit = int(data.validation_fraction * 2**64)

    def is_held_out(number: int) -> bool:
        hashed = hashlib.blake2b(number.to_bytes(8, "little"), key=key, digest_size=8).digest()
        return int.from_bytes(hashed, "little") < limit

    return is_held_out
