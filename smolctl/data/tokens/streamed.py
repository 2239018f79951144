"""A Hub dataset, tokenized as far as a run reads it, and further when a run is extended.

The cache contains the beginning of the stream in segments of whole documents. The content of a segment
depends only on the rows before its end, never on how much a run needed: a longer run reads the same segments
and appends others. Validation is held out only from the first segment, so it does not change either; held-out
documents are left out if they occur again in a later segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smolctl.config.data import DataConfig
from smolctl.data.text.corpus import SequenceLengthError
from smolctl.data.text.hub import DatasetName, DatasetReader
from smolctl.data.tokenizer.text_encoder import TextEncoder
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokens.cache import (
    FORMAT,
    LEAST_HELD_OUT,
    Manifest,
    OnNote,
    OnProgress,
    TokenizedCorpus,
    digest,
    folder_of,
    held_out_limit,
    locked,
    read_manifest,
    whole_or_absent,
    write_manifest,
)
from smolctl.data.tokens.encoding import Bookmark, DocumentPiece, Encoded, encode_documents
from smolctl.data.tokens.mixture import Mixture, Part
from smolctl.data.tokens.shards import Shard, ShardWriter, TokenStream, token_dtype
from smolctl.errors import InputError

# Windows that are shuffled among themselves. A run reads whole blocks, because their order must not depend on
# how many follow.
BLOCK_WINDOWS = 2_048
# Training tokens of a segment: an eighth of those before it, so that little is read in vain and a long stream
# does not need thousands of files, within these limits.
SEGMENT_TOKENS = 2**21, 2**25


@dataclass(frozen=True, kw_only=True)
class Segment(Manifest):
    """The manifest of a segment.

    Attributes:
        documents: from the beginning of the stream to the end of this segment.
        duplicates: documents of this segment that are equal to an earlier one in it.
        tokens, bytes, special_tokens: of this segment.
        held_out_digests: `DocumentPiece.digest` of the first piece of each held-out document; for the first
            segment.
        bookmark: where reading continues; up to a batch of documents before the segment's end.
        ended: the stream has no more rows.
    """

    source: str
    held_out_digests: tuple[int, ...]
    bookmark: Bookmark
    ended: bool

    @property
    def train_tokens(self) -> int:
        """Training tokens of this segment."""
        return sum(shard.tokens for shard in self.train)


def tokenize_stream(
    dataset: DatasetName,
    data: DataConfig,
    tokenizer: Tokenizer,
    cache: Path,
    samples: int | None,
    on_progress: OnProgress | None,
    on_note: OnNote,
) -> TokenizedCorpus:
    """Encode the beginning of a dataset, or find all or part of it in the cache.

    Args:
        dataset: with a commit, so that its rows stay the same.
        data: text field, window length and held-out share.
        tokenizer: encodes the text.
        cache: folder of the results.
        samples: windows that the run reads in total; None reads the whole dataset.
        on_progress: called after every batch of new text.
        on_note: as in `tokenize_corpus`.

    Raises:
        InputError: the dataset is empty or shorter than one window.
        DiskError: the disk is full.
        HubError: the dataset is not available.
    """
    folder = folder_of(cache, [[FORMAT, *SEGMENT_TOKENS], str(dataset)], data, tokenizer)
    needed = None
    if samples is not None:
        blocks = -(-samples // BLOCK_WINDOWS)
        needed = blocks * BLOCK_WINDOWS * data.sequence_length + 1
    segments = _read(folder, tokenizer, needed, on_note)
    if not _suffice(segments, needed):
        with locked(folder, on_note):
            segments = _read(folder, tokenizer, needed, lambda _: None)
            extension = _Extension(folder, dataset, data, tokenizer, on_progress)
            if not _suffice(segments, needed):
                segments = extension.extend(segments, needed)
    return _cut(folder, dataset, segments, data, needed)


def _path(folder: Path, number: int) -> Path:
    return folder / f"segment-{number:05d}"


def _read(folder: Path, tokenizer: Tokenizer, needed: int | None, on_note: OnNote) -> list[Segment]:
    """Read as many segments as needed, up to the first that is missing or damaged."""
    segments: list[Segment] = []
    while not _suffice(segments, needed):
        segment = read_manifest(_path(folder, len(segments)), Segment, tokenizer, on_note)
        if segment is None:
            break
        segments.append(segment)
    return segments


def _suffice(segments: list[Segment], needed: int | None) -> bool:
    if segments and segments[-1].ended:
        return True
    return needed is not None and sum(segment.train_tokens for segment in segments) >= needed


@dataclass(frozen=True)
class _Extension:
    """Adds segments to a folder. The lock must be held."""

    folder: Path
    dataset: DatasetName
    data: DataConfig
    tokenizer: Tokenizer
    on_progress: OnProgress | None

    def extend(self, segments: list[Segment], needed: int | None) -> list[Segment]:
        """Continue after the last segment until there is enough, or the stream ends."""
        start = segments[-1].bookmark if segments else Bookmark()
        reader = DatasetReader(self.dataset, self.data.text_fields[0], self.data.splits[0], start.state)
        encoder = TextEncoder(self.tokenizer, self.data.special_tokens)
        batches = encode_documents(
            lambda _: reader.documents(), encoder, first=start.documents, state=reader.state
        )
        segments = list(segments)
        with closing(batches):
            done = segments[-1].documents if segments else 0
            pieces = (item for item in self._pieces(batches) if item[0].document >= done)
            while not _suffice(segments, needed):
                segments.append(self._write(segments, pieces))
        return segments

    def _pieces(self, batches: Iterator[Encoded]) -> Iterator[tuple[DocumentPiece, Bookmark]]:
        """Every piece with the last bookmark before its end."""
        bookmark = Bookmark()
        for batch in batches:
            if self.on_progress is not None:
                self.on_progress(batch.progress)
            bookmark = batch.bookmark or bookmark
            for piece in batch.pieces:
                yield piece, bookmark

    def _write(self, before: list[Segment], pieces: Iterator[tuple[DocumentPiece, Bookmark]]) -> Segment:
        """Write the next segment: documents until it has enough tokens, or the stream ends."""
        least, most = SEGMENT_TOKENS
        target = min(most, max(least, sum(segment.train_tokens for segment in before) // 8))
        limit = held_out_limit(self.data.validation_fraction)
        held_before = set(before[0].held_out_digests) if before else set()
        held_digests: list[int] = []
        digests: set[int] = set()
        document, part = -1, None
        first = documents = before[-1].documents if before else 0
        bookmark = before[-1].bookmark if before else Bookmark()
        dtype = token_dtype(self.tokenizer.vocab_size)
        size, special_tokens, ended = 0, 0, True
        with (
            whole_or_absent(_path(self.folder, len(before))) as partial,
            closing(ShardWriter(partial, "train", dtype)) as train,
            closing(ShardWriter(partial, "held-out", dtype)) as held_out,
        ):
            for piece, last_bookmark in pieces:
                bookmark = last_bookmark
                if piece.document != document:  # its first piece
                    document, part = piece.document, train
                    if before:
                        part = None if piece.digest in held_before else train
                    elif piece.digest < limit:
                        part = held_out
                        held_digests.append(piece.digest)
                if part is not None:
                    part.append(piece.ids)
                    size += piece.size
                    special_tokens += piece.special_tokens
                if piece.ends:
                    documents += 1
                    digests.add(piece.digest)
                if piece.ends and train.tokens >= target:
                    ended = False
                    break
            if not documents:
                raise InputError(
                    f"{self.dataset}: the dataset has no text", "Name one that has, or another text_field."
                )
            segment = Segment(
                tokenizer=self.tokenizer.sha256,
                source=str(self.dataset),
                dtype=dtype.str,
                documents=documents,
                duplicates=documents - first - len(digests),
                tokens=train.tokens + held_out.tokens,
                bytes=size,
                special_tokens=special_tokens,
                train=train.finish(),
                held_out=held_out.finish(),
                held_out_digests=tuple(sorted(set(held_digests))),
                bookmark=bookmark,
                ended=ended,
            )
            write_manifest(partial, segment)
        return segment


def _cut(
    folder: Path, dataset: DatasetName, segments: list[Segment], data: DataConfig, needed: int | None
) -> TokenizedCorpus:
    """The training tokens of a run: whole blocks of windows, or everything if the stream has ended."""
    window = data.sequence_length + 1
    total = sum(segment.train_tokens for segment in segments)
    length = total if needed is None else min(total, needed)
    if length < window:
        raise SequenceLengthError(
            f"{dataset}: {length:,} tokens to train on; a sequence takes sequence_length + 1 = {window:,}",
            "Name a larger dataset, or lower data.sequence_length or data.validation_fraction.",
        )
    dtype, numbered = segments[0].dtype, [(number, segment.train) for number, segment in enumerate(segments)]
    held_out = sum(shard.tokens for shard in segments[0].held_out)
    train = Part(
        _stream(folder, numbered, dtype, length),
        block=BLOCK_WINDOWS,
        repeats=segments[-1].ended and length == total,
    )
    validation = Part(_stream(folder, [(0, segments[0].held_out)], dtype, held_out))
    return TokenizedCorpus(
        folders=(folder,),
        fingerprint=_fingerprint(dataset, segments[0]),
        train=Mixture((train,)),
        validation=Mixture((validation,)) if held_out >= min(window, LEAST_HELD_OUT) else None,
        documents=segments[-1].documents,
        duplicates=sum(segment.duplicates for segment in segments),
        tokens=sum(segment.tokens for segment in segments),
        bytes=sum(segment.bytes for segment in segments),
        notes=_notes(dataset, data, held_out, window),
        special_tokens=sum(segment.special_tokens for segment in segments),
    )


def _stream(
    folder: Path, segments: list[tuple[int, tuple[Shard, ...]]], dtype: str, length: int
) -> TokenStream:
    files = [
        (_path(folder, number) / shard.file, shard.tokens) for number, shards in segments for shard in shards
    ]
    return TokenStream(files, np.dtype(dtype), 0, length)


def _fingerprint(dataset: DatasetName, first: Segment) -> str:
    """Hash of the dataset's commit and its first segment, which must not change when more is streamed.

    The commit determines the later rows.
    """
    return digest([str(dataset), first.dtype, [shard.sha256 for shard in first.train + first.held_out]])


def _notes(dataset: DatasetName, data: DataConfig, held_out: int, window: int) -> tuple[str, ...]:
    least = min(window, LEAST_HELD_OUT)
    if not data.validation_fraction or held_out >= least:
        return ()
    return (
        f"{dataset}: the documents held out from its beginning have {held_out:,} tokens, fewer than "
        f"{least:,}: there is no validation on it. Raise data.validation_fraction.",
    )
