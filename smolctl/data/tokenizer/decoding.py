"""Token ids back to text as they come, without ever showing half a character."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence

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


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether tokens are spelled in the byte alphabet (GPT-2's kind) rather than in text."""
    decoder = json.loads(backend.to_str())["decoder"] or {}
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
    """Decodes ids one by one; the deltas, concatenated, are the decoding of all ids.

    Args:
        backend: the tokenizer.
        token_bytes: bytes of every id where the tokenizer is byte-level, else None.
        skip_special: whether special tokens show.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, token_bytes: Sequence[bytes] | None, skip_special: bool
    ) -> None:
        self._backend = backend
        self._token_bytes = token_bytes
        self._skip_special = skip_special
        self._skipped = {
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special and skip_special
        }
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._shown = ""

    def feed(self, token_id: int) -> str:
        """What can be shown now; empty while a character is not complete."""
        if self._token_bytes is not None:
            if token_id in self._skipped or not 0 <= token_id < len(self._token_bytes):
                return ""
            return self._utf8.decode(self._token_bytes[token_id])
        self._ids.append(token_id)
        text: str = self._backend.decode(self._ids, skip_special_tokens=self._skip_special)
        # A character that is not complete shows as U+FFFD at the end.
        return "" if text.endswith("\ufffd") else self._advance(text)

    def finish(self) -> str:
        """What is left when no more ids come: U+FFFD for a character that was never completed."""
        if self._token_bytes is not None:
            return self._utf8.decode(b"", final=True)
        return self._advance(self._backend.decode(self._ids, skip_special_tokens=self._skip_special))

    def _advance(self, text: str) -> str:
        delta = text[len(self._shown) :]
        self._shown = text
        return delta
