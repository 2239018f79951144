"""Documents to token ids on all cores, a few megabytes at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smolctl.data.text.documents import Document, OnRead, utf8_size
from smolctl.data.tokenizer.text_encoder import TextEncoder, TextPiece

# Text that is encoded together: enough for every core, little enough for any memory (a token temporarily
# takes about 100 bytes).
BATCH_CHARACTERS = 2 * 1024 * 1024


@dataclass(frozen=True)
class TokenizeProgress:
    """Progress of tokenization.

    Attributes:
        bytes_read: of the sources; of compressed ones, their size on the disk.
        bytes_total: of the sources; None for a Hub dataset.
        documents: encoded so far.
        tokens: so far.
        bytes: of the UTF-8 text of these tokens.
        special_tokens: spelled in that text.
        empty: documents without text, which are left out of the other counts.
    """

    bytes_read: int = 0
    bytes_total: int | None = None
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    special_tokens: int = 0
    empty: int = 0


class DocumentPiece(NamedTuple):
    """Ids of a part of a document."""

    ids: NDArray[np.uint32]  # (N,), including the tokens that begin and end every document
    document: int  # number of the document; empty ones are not counted
    digest: int  # 64 bits that identify the document's text from its start to the end of this piece
    ends: bool  # whether the document ends with this piece
    size: int  # bytes of UTF-8 text
    special_tokens: int  # spelled in it


@dataclass(frozen=True)
class Bookmark:
    """A position between two documents, from which reading can continue later."""

    documents: int = 0  # before it; empty ones are not counted
    state: dict[str, Any] | None = None  # of the reader; None: its beginning


@dataclass(frozen=True)
class Encoded:
    """The ids of a batch, and the progress after it."""

    pieces: list[DocumentPiece]
    bookmark: Bookmark | None  # before the first document that begins in this batch
    progress: TokenizeProgress


@dataclass
class _Batch:
    """Pieces of documents; a document may continue in the next batch."""

    pieces: list[TextPiece] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    begins_document: list[bool] = field(default_factory=list)
    ends_document: list[bool] = field(default_factory=list)
    bookmark: Bookmark | None = None
    bytes_read: int = 0
    empty: int = 0


def encode_documents(
    read: Callable[[OnRead], Iterator[Document]],
    encoder: TextEncoder,
    bytes_total: int | None = None,
    first: int = 0,
    state: Callable[[], dict[str, Any] | None] = lambda: None,
) -> Generator[Encoded, None, None]:
    """Encode every document, with the tokens that the encoder adds at its beginning and end.

    The next batch is read and the previous one is written while one is encoded.

    Args:
        read: yields the documents; takes a function that is called with the bytes read.
        encoder: encodes the pieces.
        bytes_total: that will be read, if known.
        first: number of the first document that is not empty.
        state: returns the reader's position for bookmarks; called between two documents.
    """
    progress = TokenizeProgress(bytes_total=bytes_total)
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: tuple[_Batch, Future[list[NDArray[np.uint32]]]] | None = None
        for batch in _batches(read, encoder, first, state):
            future = pool.submit(encoder.encode, batch.pieces)
            if waiting is not None:
                encoded = _collect(*waiting, encoder, progress)
                progress = encoded.progress
                yield encoded
            waiting = batch, future
        if waiting is not None:
            yield _collect(*waiting, encoder, progress)


def _batches(
    read: Callable[[OnRead], Iterator[Document]],
    encoder: TextEncoder,
    number: int,
    state: Callable[[], dict[str, Any] | None],
) -> Iterator[_Batch]:
    batch, size = _Batch(bookmark=Bookmark(number, state())), 0

    def on_read(count: int) -> None:
        batch.bytes_read += count

    for document in read(on_read):
        begun = False
        digest = hashlib.blake2b(digest_size=8)
        for piece in encoder.pieces(document.chunks):
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = _Batch(), 0
            batch.pieces.append(piece)
            batch.documents.append(number)
            digest.update(piece.text.encode("utf-8", "surrogatepass"))
            batch.digests.append(int.from_bytes(digest.digest(), "little"))
            batch.begins_document.append(not begun)
            batch.ends_document.append(False)
            size += len(piece.text)
            begun = True
        if begun:
            batch.ends_document[-1] = True
            number += 1
        else:
            batch.empty += 1
        if batch.bookmark is None:
            batch.bookmark = Bookmark(number, state())
    if batch.pieces or batch.empty:
        yield batch


def _collect(
    batch: _Batch, future: Future[list[NDArray[np.uint32]]], encoder: TextEncoder, before: TokenizeProgress
) -> Encoded:
    pieces = []
    documents = zip(batch.documents, batch.digests, batch.begins_document, batch.ends_document, strict=True)
    rows = zip(future.result(), batch.pieces, documents, strict=True)
    for ids, text, (document, digest, begins, ends) in rows:
        around = (encoder.begin if begins else (), ids, encoder.end if ends else ())
        whole = np.concatenate([np.asarray(part, ids.dtype) for part in around])
        pieces.append(DocumentPiece(whole, document, digest, ends, utf8_size(text.text), text.special_tokens))
    progress = TokenizeProgress(
        bytes_read=before.bytes_read + batch.bytes_read,
        bytes_total=before.bytes_total,
        documents=before.documents + sum(batch.ends_document),
        tokens=before.tokens + sum(len(piece.ids) for piece in pieces),
        bytes=before.bytes + sum(piece.size for piece in pieces),
        special_tokens=before.special_tokens + sum(piece.special_tokens for piece in pieces),
        empty=before.empty + batch.empty,
    )
    return Encoded(pieces, batch.bookmark, progress)
