"""Decodes token ids incrementally, without ever returning part of a character."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence

import tokenizers


def _byte_alphabet() -> dict[str, int]:
    """The printable character with which byte-level BPE represents each byte, inverted.

    Bytes that are printable in Latin-1 represent themselves; the others are numbered from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
LONGEST_CHARACTER = 4  # bytes in UTF-8


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether tokens are written in the byte alphabet (like GPT-2's) instead of text."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}  # noqa: TID251 - the library's own
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def bytes_of_token(token: str, byte_level: bool) -> bytes:
    """The bytes of text of a token.

    Args:
        token: as written in the vocabulary.
        byte_level: whether it is written in the byte alphabet; otherwise like SentencePiece, with ▁ for space
            and <0x0A> for bytes.
    """
    if byte_level:
        if all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return token.encode("utf-8", "replace")  # an added token, written as plain text
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode("utf-8", "replace")


class TextStream:
    """Decodes ids one by one; the concatenated results are the text that the ids add after `before`.

    Args:
        backend: the tokenizer.
        bytes_of: returns the bytes of an id if the tokenizer is byte-level; else None.
        skip_special: whether special tokens are left out.
        before: ids of the text that is continued. Tokenizers that are not byte-level drop the first space of
            a text, and also that of a continuation which is decoded alone.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bytes_of: Callable[[int], bytes | None] | None,
        skip_special: bool,
        before: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        self._bytes_of = bytes_of
        self._skip_special = skip_special
        self._skipped = {
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special and skip_special
        }
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Ids whose text was returned last, before the pending ones: enough context to decode the next ones.
        self._context = list(before)
        self._waiting: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that is complete; empty in the middle of a character."""
        if token_id in self._skipped:
            return ""
        if self._bytes_of is not None:
            return self._utf8.decode(self._bytes_of(token_id) or b"")
        if self._backend.id_to_token(token_id) is None:
            return ""
        self._waiting.append(token_id)
        return self._advance(len(self._waiting) >= LONGEST_CHARACTER)

    def finish(self) -> str:
        """The rest after the last id: U+FFFD for an incomplete character."""
        if self._bytes_of is not None:
            return self._utf8.decode(b"", final=True)
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        shown, text = (self._decode(ids) for ids in (self._context, self._context + self._waiting))
        # An incomplete character is decoded as U+FFFD at the end.
        if len(text) <= len(shown) or (text.endswith("\ufffd") and not final):
            return ""
        self._context, self._waiting = self._waiting, []
        return text[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=self._skip_special)
        return text
