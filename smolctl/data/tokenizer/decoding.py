"""Token ids back to text as they come, without ever showing half a character."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence

import tokenizers


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, turned round.

    Bytes that Latin-1 prints stand for themselves; the others are counted up from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
LONGEST_CHARACTER = 4  # bytes in UTF-8


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether tokens are spelled in the byte alphabet (GPT-2's kind) rather than in text."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}  # noqa: TID251 - the library's own
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def bytes_of_token(token: str, byte_level: bool) -> bytes:
    """The bytes of text that a token stands for.

    Args:
        token: as the vocabulary spells it.
        byte_level: the spelling's kind; otherwise SentencePiece's, with ▁ for space and <0x0A> for bytes.
    """
    if byte_level:
        if all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return token.encode("utf-8", "replace")  # an added token, spelled as it is
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode("utf-8", "replace")


class TextStream:
    """Decodes ids one by one; the deltas, concatenated, are what decoding them behind `before` adds to it.

    Args:
        backend: the tokenizer.
        bytes_of: gives the bytes of an id where the tokenizer is byte-level, else None.
        skip_special: whether special tokens are left out.
        before: ids of the text that is continued. Where a tokenizer is not byte-level, the first space of a
            text is dropped, and so is a space that begins a continuation which is decoded by itself.
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
        # Ids whose text was shown last, before those that wait: enough to see how the next ones join.
        self._context = list(before)
        self._waiting: list[int] = []

    def feed(self, token_id: int) -> str:
        """What can be shown now; empty while a character is not complete."""
        if token_id in self._skipped:
            return ""
        if self._bytes_of is not None:
            return self._utf8.decode(self._bytes_of(token_id) or b"")
        if self._backend.id_to_token(token_id) is None:
            return ""
        self._waiting.append(token_id)
        return self._advance(len(self._waiting) >= LONGEST_CHARACTER)

    def finish(self) -> str:
        """What is left when no more ids come: U+FFFD for a character that was never completed."""
        if self._bytes_of is not None:
            return self._utf8.decode(b"", final=True)
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        shown, text = (self._decode(ids) for ids in (self._context, self._context + self._waiting))
        # A character that is not complete shows as U+FFFD at the end.
        if len(text) <= len(shown) or (text.endswith("\ufffd") and not final):
            return ""
        self._context, self._waiting = self._waiting, []
        return text[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=self._skip_special)
        return text
