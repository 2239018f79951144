"""What is kept of a corpus's tokens: its parts, and folders that are whole or absent."""

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

FORMAT = 3  # of the folders; an older one is never read
MANIFEST = "manifest.json"
TOKENS = "tokens"  # the folder of the folders, in the cache
NAME_LENGTH = 32  # of a folder's name: hexadecimal digits of its `digest`
# Fewer held-out tokens than these say too little about a model.
LEAST_HELD_OUT = 33
OnProgress = Callable[[TokenizeProgress], None]
OnNote = Callable[[str], None]


@dataclass(frozen=True)
class ConversationFacts:
    """What became of the conversations of a corpus.

    Attributes:
        conversations: that are trained on or held out.
        shapes: of their rows.
        trained_share: of their tokens, that are trained on.
        padding: share of the training sequences that is filler.
        sequences: to train on.
        cut: conversations that were longer than a sequence.
        dropped: conversations of which nothing could be kept.
        skipped: rows that are not conversations to train on.
        remarks: what people should know of conversations that are trained on, and of how many each.
        example: one conversation as runs of text, and whether each is trained on.
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
    """Tokens to train on and tokens to validate on.

    Attributes:
        folders: the shards and their manifests, of each part.
        fingerprint: SHA-256 that identifies the training tokens and their order. It stays the same when
            more of a Hub dataset is streamed.
        train: tokens to train on; every document ends with the end-of-text token.
        validation: tokens held out, or None. Of a mixture: of each source, by its share.
        documents: texts in both.
        duplicates: of these, texts that are equal to an earlier one of their source. Of a Hub dataset those
            within a segment of some million tokens are counted.
        tokens: in both.
        bytes: of UTF-8 text in both.
        notes: what the user should know about them.
        read: what was read and what was not, in sentences.
        special_tokens: spelled in the text.
        empty: texts without a character, which were left out; not counted of a Hub dataset.
        conversations: what became of them; None of plain text.
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
    """What `manifest.json` says of a folder; its writers add what they were made from."""

    tokenizer: str  # sha256
    dtype: str
    documents: int
    duplicates: int
    tokens: int
    bytes: int
    special_tokens: int  # spelled in the text
    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]


M = TypeVar("M", bound=Manifest)


def digest(parts: object) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()  # noqa: TID251 - to be hashed


def folder_of(cache: Path, made_from: list[Any], data: DataConfig, tokenizer: Tokenizer) -> Path:
    """Where a result is kept: under a name that changes with everything that changes the result."""
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
    """One process at a time builds a folder; the others say that they wait, and wait.

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
    """The manifest of a folder, which one process at a time builds where `read` finds none.

    Args:
        folder: of the result.
        read: gives its manifest, or None; called with a function that takes notes on damage.
        build: makes the folder while its lock is held.
        on_note: called with notes on damage, and while another process is waited for.

    Raises:
        InputError: as `locked` and `build`.
    """
    found = read(on_note)
    if found is None:
        with locked(folder, on_note):
            found = read(lambda _: None) or build()
    return found


def remove_leftovers(tokens: Path) -> None:
    """Delete the unfinished folders of processes that were killed: nobody holds their lock."""
    for pattern in ("*.partial", "*/*.partial"):
        # Unlike a path's own, this one does not mind folders that others rename while it looks into them.
        for found in glob(pattern, root_dir=tokens):  # noqa: PTH207
            with suppress(OSError), lock_of(tokens / found[:NAME_LENGTH]).acquire(timeout=0):  # held: Timeout
                shutil.rmtree(tokens / found, ignore_errors=True)


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
        write_text(folder / MANIFEST, json_text(asdict(manifest) | {"format": FORMAT}, indent=2))


def read_manifest(
    folder: Path,
    schema: type[M],
    tokenizer: Tokenizer,
    on_note: OnNote,
    dtype: np.dtype[np.unsignedinteger] | None = None,
) -> M | None:
    """What `write_manifest` said, or None when nothing is there or the shards do not agree with it.

    Keys that a later version has added are left out. The folder counts as used now.

    Args:
        folder: of the shards.
        schema: of the manifest.
        tokenizer: that they must be of.
        on_note: called with notes on damage, and that the text is therefore tokenized again.
        dtype: of the shards; None: the one that the tokenizer's ids need.
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
    """A document is held out when the `DocumentPiece.digest` of its first piece is below this.

    So equal documents, and those that begin with the same 16 thousand characters, are held out together,
    whatever the seed and wherever in the corpus they are.
    """
    return int(fraction * 2**64)
