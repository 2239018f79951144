"""Conversations in the cache: tokens and marks in shards, an index, and the manifest."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolctl.config.data import DataConfig
from smolctl.data.text.conversations import Conversation, RowError, read_conversation
from smolctl.data.text.corpus import Source
from smolctl.data.text.documents import utf8_size
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokenizer.turns import TurnEncoder, Turns
from smolctl.data.tokens.cache import (
    Manifest,
    OnNote,
    OnProgress,
    digest,
    read_manifest,
    whole_or_absent,
    write_manifest,
)
from smolctl.data.tokens.encoding import TokenizeProgress
from smolctl.data.tokens.marks import CONTEXT, FIRST
from smolctl.data.tokens.shards import ShardWriter, TokenStream, disk_errors
from smolctl.durable import file_digest, holds_once
from smolctl.errors import InputError

DTYPE = np.dtype("<u4")
NAME = "conversations"
MASKS = 3  # version of the rules by which conversations become tokens and masks
INDEX = "index.bin"  # key, length and trained tokens of every conversation, (N, 3); little-endian uint64
AT_ONCE = 512  # conversations that are encoded together
NAMED = 5  # number of skipped rows to list


@dataclass(frozen=True, kw_only=True)
class ConversationManifest(Manifest):
    """The manifest of conversations.

    Attributes:
        shapes: of the rows, of each source.
        skipped: how many rows are not conversations for training, by reason.
        named: the first of them, with file and line.
        remarks: notes about conversations that are trained on, with their numbers.
        settings: digest of the settings that affect it.
        index: SHA-256 of the file `INDEX`.
    """

    sources: tuple[str, ...]
    shapes: tuple[str, ...]
    skipped: dict[str, int]
    named: tuple[str, ...]
    remarks: dict[str, int]
    settings: str
    index: str


def settings_of(data: DataConfig, tokenizer: Tokenizer) -> list[Any]:
    """All settings that affect the tokens and masks of given rows, in addition to those of `folder_of`."""
    named = sorted(tokenizer.named_tokens.items())
    return [MASKS, data.shape, data.loss, data.strict, tokenizer.chat_template, named]


def read_conversation_manifest(
    folder: Path, tokenizer: Tokenizer, on_note: OnNote
) -> ConversationManifest | None:
    """The manifest of a folder with intact files; None if they are damaged or missing."""
    manifest = read_manifest(folder, ConversationManifest, tokenizer, on_note, DTYPE)
    if manifest is None:
        return None
    path = folder / INDEX
    try:
        sound = holds_once(path, f"sha256 {manifest.index}", lambda: file_digest(path) == manifest.index)
    except OSError:
        sound = False
    return manifest if sound else None


class _Rows:
    """The conversations in the rows of sources, read once, with statistics of the rows."""

    def __init__(self, sources: Sequence[Source], data: DataConfig) -> None:
        self.sources, self.data = sources, data
        self.bytes_read = 0
        self.shapes: dict[str, None] = {}
        self.skipped: Counter[str] = Counter()
        self.named: list[str] = []  # the first that were skipped

    def __iter__(self) -> Iterator[Conversation]:
        for source in self.sources:
            for where, row in source.rows(self._count):
                if isinstance(row, str):
                    self.skip(where, row)
                    continue
                try:
                    conversation = read_conversation(row, self.data.shape, where)
                    self.shapes[conversation.shape.value] = None
                    yield conversation
                except RowError as error:
                    self.skip(where, str(error))

    def _count(self, count: int) -> None:
        self.bytes_read += count

    def skip(self, where: str, reason: str) -> None:
        """Skip a row. Raises InputError if `data.strict` forbids it."""
        if self.data.strict:
            raise InputError(f"{where}: {reason}", "Correct the row, or leave out --strict to skip it.")
        self.skipped[reason] += 1
        if len(self.named) < NAMED:
            self.named.append(f"{where}: {reason}")


def write_conversations(
    folder: Path,
    data: DataConfig,
    sources: Sequence[Source],
    encoder: TurnEncoder,
    on_progress: OnProgress | None,
) -> ConversationManifest:
    """Render and encode all conversations of the sources into a folder, which is written atomically.

    Raises:
        InputError: a source is damaged or has no conversation for training; with `data.strict`, a row is not
            one.
    """
    rows, remarks, index = _Rows(sources, data), Counter[str](), array("Q")
    progress = TokenizeProgress(bytes_total=sum(source.size or 0 for source in sources))
    with (
        whole_or_absent(folder) as partial,
        closing(ShardWriter(partial, NAME, DTYPE)) as words,
    ):
        conversations = iter(rows)
        while batch := list(islice(conversations, AT_ONCE)):
            for conversation, turns in zip(batch, encoder.encode(batch), strict=True):
                if isinstance(turns, RowError):
                    rows.skip(conversation.where, str(turns))
                    continue
                remarks.update(turns.remarks)
                words.append(_marked(turns))
                index.extend((key_of(conversation, turns), len(turns.ids), int(turns.is_trained.sum())))
                size = sum(utf8_size(message["content"]) for message in conversation.messages)
                progress = replace(
                    progress,
                    documents=progress.documents + 1,
                    tokens=progress.tokens + len(turns.ids),
                    bytes=progress.bytes + size,
                )
            progress = replace(progress, bytes_read=rows.bytes_read)
            if on_progress is not None:
                on_progress(progress)
        if not progress.documents:
            raise InputError(
                f"{', '.join(source.name for source in sources)}: no conversation to train on"
                + (f"; {rows.named[0]}" if rows.named else ""),
                "Each row needs messages, conversations, prompt and completion, or instruction and output.",
            )
        records = np.frombuffer(index, np.uint64)
        with disk_errors(partial):
            records.astype("<u8").tofile(partial / INDEX)
        manifest = ConversationManifest(
            tokenizer=encoder.tokenizer.sha256,
            sources=tuple(source.name for source in sources),
            dtype=DTYPE.str,
            documents=progress.documents,
            duplicates=progress.documents - len(np.unique(records[::3])),
            tokens=progress.tokens,
            bytes=progress.bytes,
            special_tokens=0,
            train=words.finish(),
            held_out=(),
            shapes=tuple(rows.shapes),
            skipped=dict(rows.skipped),
            named=tuple(rows.named),
            remarks=dict(remarks),
            settings=digest(settings_of(data, encoder.tokenizer)),
            index=file_digest(partial / INDEX),
        )
        write_manifest(partial, manifest)
    return manifest


def key_of(conversation: Conversation, turns: Turns) -> int:
    """64 bits that are equal for conversations that must be held out together."""
    text = conversation.group.encode() or turns.ids.tobytes()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _marked(turns: Turns) -> NDArray[np.int64]:
    words = turns.ids | np.where(turns.is_trained, 0, CONTEXT)
    words[0] |= FIRST
    return words


def read_tokens(folder: Path, manifest: ConversationManifest) -> TokenStream:
    """The marked tokens of all conversations, one after another."""
    files = [(folder / shard.file, shard.tokens) for shard in manifest.train]
    return TokenStream(files, DTYPE, 0, sum(shard.tokens for shard in manifest.train))


def read_index(folder: Path) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Key, length and number of trained tokens of every conversation, each (N,)."""
    keys, lengths, trained = np.fromfile(folder / INDEX, "<u8").reshape(-1, 3).T.copy()
    return keys, lengths.astype(np.int64), trained.astype(np.int64)
