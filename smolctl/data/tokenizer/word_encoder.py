"""Encodes texts that are divided into words like GPT-2's, each distinct word once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from smolctl.data.tokenizer.prompt import any_of

IDS = np.dtype("<u4")
_BEYOND = r"\x80-\U0010ffff"  # ASCII
# Non-ASCII white space: how much of it belongs to a word depends on what follows.
_OTHER_SPACE = r"[\x85\xa0\u1680\u180e\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
# Characters of cached words: about 50 MB for short words, because an entry takes about 200 bytes.
_KEPT = 1 << 20


def _division(digits: bool) -> re.Pattern[str]:
    """GPT-2's division of a text into words, for ASCII text.

    A word that other characters might belong to is left to the tokenizer, with everything up to the next
    white space, before which every word ends.

    Args:
        digits: whether the text is first split at every digit, as in SmolLM. The text before a digit is then
            at the end of its part.
    """
    # 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ is the original.
    alone = rf"(?![{_BEYOND}])"
    return re.compile(
        r"'(?:[stmd]|re|ve|ll)"
        rf"| ?[A-Za-z]++{alone}"
        + (r"|[0-9]" if digits else rf"| ?[0-9]++{alone}")
        + rf"| ?[^\sA-Za-z0-9{_BEYOND}]++{alone}"
        rf"|(?!\s++[{_BEYOND}])(?:\s+(?![^\s{'0-9' if digits else ''}])|[^\S ])"
        r"|\s*\S+",
        re.ASCII,
    )


class WordEncoder:
    """Encodes texts by looking up their words; only new words are encoded by the tokenizer.

    Args:
        backend: the tokenizer.
        division: finds the words of a text in order.
    """

    def __init__(self, backend: tokenizers.Tokenizer, division: re.Pattern[str]) -> None:
        self._backend, self._division = backend, division
        added = backend.get_added_tokens_decoder().values()
        self._unsuited = re.compile(f"{_OTHER_SPACE}|{any_of(token.content for token in added)}")
        self._known: dict[str, bytes] = {}  # ids of a word
        self._kept = 0  # characters of cached words

    @staticmethod
    def of(backend: tokenizers.Tokenizer, state: Mapping[str, Any]) -> WordEncoder | None:
        """Create one for byte-level BPE like GPT-2's and SmolLM's; None for other kinds of tokenizers.

        Args:
            backend: the tokenizer.
            state: the content of its tokenizer.json.
        """
        model, steps = state["model"], state["pre_tokenizer"] or {}
        *before, last = steps.get("pretokenizers") or [steps]
        digits = before == [{"type": "Digits", "individual_digits": True}]
        is_byte_level = last.get("type") == "ByteLevel" and last["use_regex"] and not last["add_prefix_space"]
        changes = state["normalizer"] or state["truncation"] or state["padding"] or model.get("dropout")
        if model["type"] != "BPE" or not is_byte_level or (before and not digits) or changes:
            return None
        return WordEncoder(backend, _division(digits))

    def suits(self, text: str) -> bool:
        """Whether a text can be divided into words here."""
        return not self._unsuited.search(text)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids (N,) of each suitable text."""
        if self._kept > _KEPT:
            self._known, self._kept = {}, 0
        divided = [self._division.findall(text) for text in texts]
        new = list(set().union(*divided).difference(self._known))
        encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
        for word, encoding in zip(new, encodings, strict=True):
            self._known[word] = np.array(encoding.ids, IDS).tobytes()
        self._kept += sum(map(len, new))
        return [np.frombuffer(b"".join(map(self._known.__getitem__, words)), IDS) for words in divided]
