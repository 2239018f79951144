"""Encodes documents like transformers; long ones in pieces, without changing an id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models

from smolctl.data.text.documents import LONGEST_PIECE, PIECE, cut
from smolctl.data.tokenizer.decoding import is_byte_level
from smolctl.data.tokenizer.prompt import SpecialTokens, any_of, hide_special_tokens
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokenizer.word_encoder import IDS, WordEncoder
from smolctl.escaping import json_text
from smolctl.sources.huggingface.tokenizer import ids_around_text, read_backend

# Characters on each side of a cut that are encoded to check that it is safe, and the context before a piece.
# Longer than what any known tokenizer uses to divide a text into words.
CONTEXT = 64


class TextPiece(NamedTuple):
    """A part of a text; its ids are those of `lead + text` without the first `skip`."""

    text: str
    lead: str  # the text before it in the document; empty at the start
    skip: int  # ids of the lead
    special_tokens: int  # number spelled in `text`


class TextEncoder:
    """Encodes whole documents for training.

    A cut could change ids, if a tokenizer treats the beginning of a text differently (SentencePiece's "▁"),
    or if a token contains characters of both sides. So a text is cut only where the ids before the place do
    not depend on what follows, and where either the tokenizer divides the text into words or no vocabulary
    entry could join the two sides. Each further piece is encoded with some of the text before it, whose ids
    are dropped. If a tokenizer has no such place, a document is not cut (up to `LONGEST_PIECE`).

    Args:
        tokenizer: gives the ids.
        special_tokens: "text" reads special tokens spelled in a text, such as `<|endoftext|>`, as ordinary
            characters; "tokens" reads them as the tokens.

    Attributes:
        begin: ids that transformers adds before every text, such as BOS.
        end: ids after every text: those that transformers adds, and the end-of-text token.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens: SpecialTokens = "text") -> None:
        self._backend, state = _reading_backend(tokenizer.backend, special_tokens)
        self._words = WordEncoder.of(self._backend, state)
        self.begin, after = ids_around_text(tokenizer.backend)
        end_of_text = tokenizer.end_of_text_id
        self.end = after if after[-1:] == [end_of_text] else [*after, end_of_text]
        added = tokenizer.backend.get_added_tokens_decoder().values()
        self._special = re.compile(any_of(token.content for token in added if token.special))
        self._joins_at_spaces = _joins_at_spaces(self._backend)
        # FixedLength counts from a text's beginning, so no place is safe.
        self._has_places = '"FixedLength"' not in self._backend.to_str()

    def pieces(
        self, chunks: Iterable[str], size: int = PIECE, longest: int = LONGEST_PIECE
    ) -> Iterator[TextPiece]:
        """Cut a text, given in parts of any length, into pieces of about `size` characters; see `cut`."""
        lead, skip = following = "", 0

        def is_safe(text: str, place: int) -> bool:
            nonlocal following
            before = text[max(0, place - CONTEXT) : place]
            ids = self._ids_of_lead(before, text[place : place + CONTEXT])
            if ids is not None:
                following = before, ids
            return ids is not None

        for text in cut(chunks, size, longest, is_safe, CONTEXT):
            yield TextPiece(text, lead, skip, len(self._special.findall(text)))
            (lead, skip), following = following, ("", 0)

    def encode(self, pieces: Sequence[TextPiece]) -> list[NDArray[np.uint32]]:
        """Ids (N,) of each piece, on all cores, without `begin` and `end`."""
        found: dict[int, NDArray[np.uint32]] = {}
        if self._words is not None:
            texts = {n: one.text for n, one in enumerate(pieces) if self._words.suits(one.text)}
            found |= zip(texts, self._words.encode(list(texts.values())), strict=True)
        rest = {n: one for n, one in enumerate(pieces) if n not in found}
        behind = [one.lead + one.text for one in rest.values()]
        encodings = self._backend.encode_batch_fast(behind, add_special_tokens=False)
        for (n, one), encoding in zip(rest.items(), encodings, strict=True):
            found[n] = np.array(encoding.ids[one.skip :], IDS)
        return [found[n] for n in range(len(pieces))]

    def _ids_of_lead(self, before: str, after: str) -> int | None:
        """The number of ids of a text that is cut off, or None if the cut would change an id."""
        if not self._has_places:
            return None
        head, both = (
            self._backend.encode(text, add_special_tokens=False) for text in (before, before + after)
        )
        count = len(head.ids)
        if not 0 < count < len(both.ids) or both.ids[:count] != head.ids:
            return None
        divided = both.word_ids[count - 1] != both.word_ids[count]
        return count if divided or (after[0] == " " and not self._joins_at_spaces) else None


def _joins_at_spaces(backend: tokenizers.Tokenizer) -> bool:
    """Whether the model could join a visible character and the space after it: only an entry like "x▁y" does.

    This holds for byte-pair merges, but not for Unigram's sums, which are rounded, and for whole words.
    """
    space = "Ġ" if is_byte_level(backend) else "[▁ ]"
    joint = re.compile(rf"[^▁Ġ ]{space}")
    is_bpe = isinstance(backend.model, models.BPE)
    return not is_bpe or any(map(joint.search, backend.get_vocab(with_added_tokens=False)))


def _reading_backend(
    backend: tokenizers.Tokenizer, special_tokens: SpecialTokens
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A copy that reads special tokens as requested, and its tokenizer.json; the original is not changed."""
    state = json.loads(backend.to_str())  # noqa: TID251 - the library's own
    if special_tokens == "text":
        hide_special_tokens(state)
    copy = read_backend(json_text(state), "a tokenizer whose special tokens are text")
    copy.encode_special_tokens = special_tokens == "text"  # like `split_special_tokens` of transformers
    return copy, state
