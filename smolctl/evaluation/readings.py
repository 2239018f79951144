"""The documents of a text in the tokens of every model, and the bits that each document costs a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from smolctl.data.text.conversations import Conversation, RowError
from smolctl.data.tokenizer.chatml import with_chatml
from smolctl.data.tokenizer.text_encoder import TextEncoder
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokenizer.turns import TurnEncoder
from smolctl.errors import InputError
from smolctl.evaluation.estimate import FEWEST_DOCUMENTS, Floats, effective_number
from smolctl.evaluation.likelihood import Target, likelihoods
from smolctl.evaluation.measure import bits
from smolctl.evaluation.texts import NAME_TEXT, Text, scored_bytes
from smolctl.generation.engine import Engine
from smolctl.generation.sampling import NotFiniteError

BLOCK = 4_096  # bytes of a part of a document, which is an observation if there are few documents
Encoding = tuple[str, str | None]  # the digest of the tokenizer, and the chat template


@dataclass(frozen=True)
class Reader:
    """The properties of a model that determine how it reads a text."""

    name: str
    tokenizer: Tokenizer

    @property
    def encoding(self) -> Encoding:
        """Equal for models that encode the same text, and the same conversation, to the same tokens."""
        return self.tokenizer.sha256, self.tokenizer.chat_template


@dataclass(frozen=True)
class EncodedDocument:
    """A document in the tokens of one model.

    Attributes:
        begin: the tokens before the document.
        ids: (T,)
        is_scored: (T,) whether a token counts; at least one does.
    """

    begin: tuple[int, ...]
    ids: NDArray[np.int64]
    is_scored: NDArray[np.bool_]


@dataclass(frozen=True)
class Blocks:
    """The text divided into parts of `BLOCK` bytes; the last part of a document is the rest.

    A conversation is one part.

    Attributes:
        first: number of the first block of each document, and the number of all blocks, (D + 1,).
        sizes: bytes of each block.
    """

    first: NDArray[np.int64]
    sizes: Floats

    @staticmethod
    def of(text: Text) -> Blocks:
        sizes = list(map(scored_bytes, text.documents))
        length = max(sizes) if text.is_chat else BLOCK
        counts = [max(1, -(-size // length)) for size in sizes]
        lengths = [
            min(length, size - start * length)
            for size, count in zip(sizes, counts, strict=True)
            for start in range(count)
        ]
        return Blocks(np.cumsum([0, *counts]), np.array(lengths, np.float64))

    @cached_property
    def by_document(self) -> bool:
        return effective_number(np.add.reduceat(self.sizes, self.first[:-1])) >= FEWEST_DOCUMENTS

    def observed(self, amounts: Floats) -> Floats:
        """Amounts (…, B) of blocks, summed for the resampled observations: documents, or blocks if there
        are few documents.
        """
        return np.add.reduceat(amounts, self.first[:-1], axis=-1) if self.by_document else amounts


def read_for_all(
    text: Text, readers: Sequence[Reader], note: Callable[[str], None]
) -> tuple[Text, dict[Encoding, list[EncodedDocument]]]:
    """Documents that all models can read, with their tokens for each encoding.

    Conversations that the chat template of one model refuses are left out for all.

    Raises:
        InputError: there is no conversation that all can read.
    """
    found: dict[Encoding, list[EncodedDocument | None]] = {}
    for reader in readers:
        if reader.encoding not in found:
            found[reader.encoding] = list(_read(text, reader, note))
    fits = [all(row) for row in zip(*found.values(), strict=True)]
    if refused := fits.count(False):
        note(
            f"Left out: {refused:,} of {len(fits):,} conversations, "
            "which the chat template of one of the models refuses."
        )
        if not any(fits):
            raise InputError(f"{text.name}: no conversation that all models can read", NAME_TEXT)
        text = Text(text.name, tuple(compress(text.documents, fits)), text.left_out)  # type: ignore[arg-type]
    readings = {encoding: [one for one in compress(own, fits) if one] for encoding, own in found.items()}
    return text, readings


def _read(text: Text, reader: Reader, note: Callable[[str], None]) -> Iterator[EncodedDocument | None]:
    """Every document as in training, without the tokens that begin and end it; a conversation includes them.

    None: the model's chat template refuses the conversation.
    """
    tokenizer = reader.tokenizer
    if not text.is_chat:
        encoder = TextEncoder(tokenizer)
        begin = tuple(encoder.begin or [tokenizer.end_of_text_id])
        for document in text.documents:
            pieces = encoder.encode(list(encoder.pieces([str(document)])))
            ids = np.concatenate(pieces, dtype=np.int64)
            yield EncodedDocument(begin, ids, np.ones(len(ids), dtype=bool))
        return
    if tokenizer.chat_template is None:
        note(f"{reader.name} has no chat template: it reads the conversations in ChatML.")
        tokenizer = with_chatml(tokenizer)
    conversations = (one for one in text.documents if isinstance(one, Conversation))
    for turns in TurnEncoder(tokenizer).encode(conversations):
        if isinstance(turns, RowError):
            yield None
        else:
            yield EncodedDocument((int(turns.ids[0]),), turns.ids[1:], turns.is_trained[1:])


def score(
    engine: Engine,
    documents: Sequence[EncodedDocument],
    lengths: NDArray[np.int32] | None,
    blocks: Blocks,
    context: int,
) -> Floats:
    """Bits of every block (B,). A token counts for the block in which it begins.

    Every document is scored separately, after the token that begins a text, or else the one that ends it. A
    long document is divided into sequences that overlap by half, so that a token is predicted from at least
    half a context; each sequence begins like a text.

    Args:
        engine: runs the model.
        documents: in the model's tokens.
        lengths: bytes of every id, (V,); None: a document is one block.
        blocks: of the text.
        context: tokens per sequence.
    """
    asked: list[Target] = []
    owners: list[int] = []
    for number, document in enumerate(documents):
        ids, scored = document.ids, np.flatnonzero(document.is_scored)
        room = max(2, context - len(document.begin) + 1)
        blocks_of = np.full(len(ids), blocks.first[number])
        if lengths is not None:
            starts = np.cumsum(lengths[ids]) - lengths[ids]  # bytes before each token
            blocks_of = np.minimum(blocks_of + starts // BLOCK, blocks.first[number + 1] - 1)
        done, last = int(scored[0]), int(scored[-1]) + 1
        while done < last:
            end = min(last, max(room, done + room // 2))
            part = scored[(done <= scored) & (scored < end)]
            cuts = np.flatnonzero((np.diff(part) > 1) | (np.diff(blocks_of[part]) > 0)) + 1
            for run in np.split(part, cuts):  # consecutive tokens in one block
                inputs = (*document.begin, *ids[max(0, end - room) : run[-1]].tolist())
                asked.append(Target(inputs, tuple(ids[run].tolist())))
                owners.append(int(blocks_of[run[0]]))
            done = end
    found = np.zeros(len(blocks.sizes))
    try:
        nats = [-one.nats for one in likelihoods(engine, asked)]
    except NotFiniteError:
        return np.full_like(found, math.nan)
    np.add.at(found, owners, bits(np.array(nats)))
    return found
