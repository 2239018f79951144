"""Documents to token ids on all cores, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from smolctl.data.corpus import Source
from smolctl.data.tokenizer import Tokenizer

# Text that is encoded at once: enough for every core, little enough for any memory (a token takes
# about 100 bytes on its way). The same everywhere, as a corpus with a limit ends with a batch.
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
    """

    bytes_read: int = 0
    bytes_total: int | None = None
    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Encoded:
    """The ids of a batch, and how far the work has come with it."""

    train: list[int]
    held_out: list[int]
    progress: TokenizeProgress


@dataclass
class _Batch:
    """Pieces of documents; a document may go on in the next batch."""

    texts: list[str] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)
    ends_document: list[bool] = field(default_factory=list)
    bytes_read: int = 0

    def bytes(self) -> int:
        return sum(len(text) if text.isascii() else len(text.encode()) for text in self.texts)


def encode_documents(
    sources: Sequence[Source], tokenizer: Tokenizer, held_out: Callable[[int], bool]
) -> Generator[Encoded, None, None]:
    """Encode every document, with the end-of-text token after each.

    The next batch is read and the previous one is written while one is encoded.

    Args:
        sources: of the documents.
        tokenizer: gives the ids.
        held_out: whether the document of a number (from 0, empty ones not counted) is for validation.
    """
    sizes = [source.size for source in sources]
    total = sum(size or 0 for size in sizes)
    progress = TokenizeProgress(bytes_total=None if None in sizes else total)
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: tuple[_Batch, Future[list[Any]]] | None = None
        for batch in _batches(sources, held_out):
            future = pool.submit(tokenizer.backend.encode_batch_fast, batch.texts, add_special_tokens=False)
            if waiting is not None:
                encoded = _collect(*waiting, tokenizer.end_of_text_id, progress)
                progress = encoded.progress
                yield encoded
            waiting = batch, future
        if waiting is not None:
            yield _collect(*waiting, tokenizer.end_of_text_id, progress)


def _batches(sources: Sequence[Source], held_out: Callable[[int], bool]) -> Iterator[_Batch]:
    batch, size, number = _Batch(), 0, 0

    def on_read(count: int) -> None:
        batch.bytes_read += count

    for source in sources:
        for document in source.read(on_read):
            begun = False
            for piece in document.pieces:
                if size >= BATCH_CHARACTERS:
                    yield batch
                    batch, size = _Batch(), 0
                batch.texts.append(piece)
                batch.held_out.append(held_out(number))
                batch.ends_document.append(False)
                size += len(piece)
                begun = True
            if begun:
                batch.ends_document[-1] = True
                number += 1
    if batch.texts:
        yield batch


def _collect(batch: _Batch, future: Future[list[Any]], end_of_text: int, before: TokenizeProgress) -> Encoded:
    train: list[int] = []
    held_out_ids: list[int] = []
    for encoding, held_out, ends in zip(future.result(), batch.held_out, batch.ends_document, strict=True):
        part = held_out_ids if held_out else train
        part += encoding.ids
        if ends:
            part.append(end_of_text)
    progress = TokenizeProgress(
        bytes_read=before.bytes_read + batch.bytes_read,
        bytes_total=before.bytes_total,
        documents=before.documents + sum(batch.ends_document),
        tokens=before.tokens + len(train) + len(held_out_ids),
        bytes=before.bytes + batch.bytes(),
    )
    return Encoded(train, held_out_ids, progress)
