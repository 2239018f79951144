"""The cached tokens of a corpus: its parts, and folders that are complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from smolctl.config.data import DataConfig
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokens.encoding import TokenizeProgress
from smolctl.data.tokens.mixture import Mixture
from smolctl.data.tokens.shards import Shard, disk_errors, find_shard_damage, token_dtype
from smolctl.durable import sync_folder, write_text
from smolctl.errors import InputError
from smolctl.escaping import json_text
from smolctl.outside import checked, read_json

FORMAT = 3  # of the folders; older ones are never read
MANIFEST = "manifest.json"
TOKENS = "tokens"  # the folder of the folders, in the cache
NAME_LENGTH = 32  # of a folder's name: hexadecimal digits of its `digest`
# Fewer held-out tokens give too little information about a model.
LEAST_HELD_OUT = 33
OnProgress = Callable[[TokenizeProgress], None]
OnNote = Callable[[str], None]


@dataclass(frozen=True)
class ConversationFacts:
    """Statistics of a corpus's conversations.

    Attributes:
        conversations: number that are trained on or held out.
        shapes: of their rows.
        trained_share: share of their tokens that are trained on.
        padding: share of padding in the training sequences.
        sequences: number of training sequences.
        cut: conversations that were longer than a sequence.
        dropped: conversations that were dropped completely.
        skipped: rows that are not conversations for training.
        remarks: notes about conversations that are trained on, with their numbers.
        example: one conversation as segments of text, and whether each is trained on.
    """

    conversations: int
    shapes: tuple[str, ...]
    trained_share: float
    padding: float
    sequences: int
    cut: int
    dropped: int
    skipped: int
    remarks: dict[str, int]
    example: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class TokenizedCorpus:
    """Tokens for training and validation.

    Attributes:
        folders: of the shards and manifests of each part.
        fingerprint: SHA-256 that identifies the training tokens and their order. It does not change when more
            of a Hub dataset is streamed.
        train: training tokens; every document ends with the end-of-text token.
        validation: held-out tokens, or None; for a mixture, of each source in proportion to its share.
        documents: texts in both.
        duplicates: texts that are equal to an earlier one of their source. Of a Hub dataset, only those
            within a segment of some million tokens are counted.
        tokens: in both.
        bytes: of UTF-8 text in both.
        notes: messages for the user about them.
        read: sentences on what was read and what was skipped.
        special_tokens: number spelled in the text.
        empty: empty texts, which were left out; not counted for a Hub dataset.
        conversations: their statistics; None for plain text.
    """

    folders: tuple[Path, ...]
    fingerprint: str
    train: Mixture
    validation: Mixture | None
    documents: int
    duplicates: int
    tokens: int
    bytes: int
    notes: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    special_tokens: int = 0
    empty: int = 0
    conversations: ConversationFacts | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json` in a folder; the writers add what the folder was made from."""

    tokenizer: str  # sha256
    dtype: str
    documents: int
    duplicates: int
    tokens: int
    bytes: int
    special_tokens: int  # number spelled in the text
    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]


M = TypeVar("M", bound=Manifest)


def digest(parts: object) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()  # noqa: TID251 - to be hashed


def folder_of(cache: Path, made_from: list[Any], data: DataConfig, tokenizer: Tokenizer) -> Path:
    """The folder of a result: its name changes with everything that affects the result."""
    parts = [
        *made_from,
        [tokenizer.sha256, tokenizer.end_of_text_id],
        [data.validation_fraction, data.text_field, data.split, data.special_tokens],
    ]
    return cache / TOKENS / digest(parts)[:NAME_LENGTH]


def lock_of(folder: Path) -> FileLock:
    """The lock that is held while a folder is built or deleted."""
    return FileLock(f"{folder}.lock")


@contextmanager
def locked(folder: Path, on_note: OnNote) -> Iterator[None]:
    """Let one process at a time build a folder; the others report that they wait.

    Raises:
        InputError: the cache cannot be written.
    """
    lock = lock_of(folder)
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_note(f"Waiting for another process that tokenizes the same text (it holds {lock.lock_file}).")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def found_or_built(
    folder: Path, read: Callable[[OnNote], M | None], build: Callable[[], M], on_note: OnNote
) -> M:
    """The manifest of a folder; if `read` finds none, one process at a time builds it.

    Args:
        folder: of the result.
        read: returns its manifest, or None; called with a function that takes notes on damage.
        build: creates the folder while its lock is held.
        on_note: called with notes on damage, and while waiting for another process.

    Raises:
        InputError: as in `locked` and `build`.
    """
    found = read(on_note)
    if found is None:
        with locked(folder, on_note):
            found = read(lambda _: None) or build()
    return found


def remove_leftovers(tokens: Path) -> None:
    """Delete the unfinished folders of killed processes: their locks are free."""
    for pattern in ("*.partial", "*/*.partial"):
        # Unlike Path's own glob, this one tolerates folders that others rename meanwhile.
        for found in glob(pattern, root_dir=tokens):  # noqa: PTH207
            with suppress(OSError), lock_of(tokens / found[:NAME_LENGTH]).acquire(timeout=0):  # held: Timeout
                shutil.rmtree(tokens / found, ignore_errors=True)


@contextmanager
def whole_or_absent(folder: Path) -> Iterator[Path]:
    """A new folder at a temporary place, moved to its final place in one step if nothing failed. The lock is
    held.

    Leftovers of a killed process, and a damaged folder at the final place, are removed first.

    Raises:
        DiskError: the disk is full or cannot be written.
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
    """Write the manifest of a folder. Raises DiskError as in `disk_errors`."""
    with disk_errors(folder):
        write_text(folder / MANIFEST, json_text(asdict(manifest) | {"format": FORMAT}, indent=2))


def read_manifest(
    folder: Path,
    schema: type[M],
    tokenizer: Tokenizer,
    on_note: OnNote,
    dtype: np.dtype[np.unsignedinteger] | None = None,
) -> M | None:
    """The manifest of a folder, or None if there is none or the shards do not match it.

    Keys added by a later version are ignored. The folder is marked as used now.

    Args:
        folder: of the shards.
        schema: of the manifest.
        tokenizer: hash of the tokenizer that they must have.
        on_note: called with notes on damage, and that the text is tokenized again because of it.
        dtype: of the shards; None: the one that the tokenizer's ids require.
    """
    dtype = dtype or token_dtype(tokenizer.vocab_size)
    if not folder.is_dir():
        return None
    try:
        content = read_json(folder / MANIFEST)
        manifest = checked(schema, content, MANIFEST)
        of = content.get("format"), manifest.tokenizer, manifest.dtype
        if of != (FORMAT, tokenizer.sha256, dtype.str):
            raise ValueError(f"{MANIFEST} belongs to another version or tokenizer")
        for shard in (*manifest.train, *manifest.held_out):
            if damage := find_shard_damage(folder / shard.file, shard, dtype, tokenizer.vocab_size):
                raise ValueError(damage)
    except (OSError, ValueError, InputError) as error:
        on_note(f"{folder}: the cached tokens are damaged ({error}). The text is tokenized again.")
        return None
    with suppress(OSError):
        os.utime(folder / MANIFEST)
    return manifest


def held_out_limit(fraction: float) -> int:
    """A document is held out if the `DocumentPiece.digest` of its first piece is below this.

    So documents that are equal, or have the same first 16 thousand characters, are held out together,
    whatever the seed and their position in the corpus.
    """
    return int(fraction * 2**64)
