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

# Text that is encoded at once: enough for every core, little enough for any memory (a token takes
# about 100 bytes on its way).
BATCH_CHARACTERS = 2 * 1024 * 1024


@dataclass(frozen=True)
class TokenizeProgress:
    """How far the work has come.

    Attributes:
        bytes_read: of the sources; compressed ones count as they lie on the disk.
        bytes_total: of the sources; None for a Hub dataset.
        documents: encoded so far.
        tokens: so far.
        bytes: of UTF-8 text that these tokens stand for.
        special_tokens: spelled in that text.
        empty: documents without text, which are left out and not counted otherwise.
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

    ids: NDArray[np.uint32]  # (N,), with what begins and ends every document
    document: int  # number of the document; empty ones are not counted
    digest: int  # 64 bits that identify the document's text from its beginning to the end of this piece
    ends: bool  # the document
    size: int  # bytes of UTF-8 text
    special_tokens: int  # spelled in it


@dataclass(frozen=True)
class Bookmark:
    """A place between two documents, from which reading can go on later."""

    documents: int = 0  # before it; empty ones are not counted
    state: dict[str, Any] | None = None  # of the reader; None: its beginning


@dataclass(frozen=True)
class Encoded:
    """The ids of a batch, and how far the work has come with it."""

    pieces: list[DocumentPiece]
    bookmark: Bookmark | None  # before the first document that begins in this batch
    progress: TokenizeProgress


@dataclass
class _Batch:
    """Pieces of documents; a document may go on in the next batch."""

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
    """Encode every document, with what the encoder puts at its beginning and its end.

    The next batch is read and the previous one is written while one is encoded.

    Args:
        read: gives the documents; takes a function that is called with the bytes read.
        encoder: gives the ids.
        bytes_total: that will be read, where it is known.
        first: number of the first document that is not empty.
        state: of what is read, for bookmarks; asked for between two documents.
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
