"""What a model is given to continue, and special tokens that messages spell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray

from smolctl.errors import InputError
from smolctl.escaping import json_text
from smolctl.sources.huggingface.tokenizer import read_backend
from smolctl.sources.stops import END_TOKENS

SpecialTokens = Literal["text", "tokens"]
# A character that no text holds: what begins with it is never found in one.
_NEVER = "\ufdd0"
DEEPEST = 100  # levels of lists and objects in a message
# The first stand-in, in a plane for private use.
_STAND_INS = 0xF0000


@dataclass(frozen=True)
class Prompt:
    """What a model continues."""

    text: str
    ids: tuple[int, ...]


def count_characters(value: Any, level: int = 0) -> int:
    """Characters of all texts in a message, or in several.

    Raises:
        InputError: it is nested too deeply.
    """
    if level > DEEPEST:
        raise InputError(f"a message is nested more than {DEEPEST} levels deep", "Send a simpler message.")
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return sum(count_characters(item, level + 1) for item in items)


def any_of(tokens: Iterable[str]) -> str:
    """A regular expression that finds tokens in a text, of several at one place the longest."""
    return "|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))) or "(?!)"


def is_control(token: tokenizers.AddedToken) -> bool:
    """Whether an added token steers a model: it is special, or is not marked so but looks like one."""
    spelled = token.content
    looks_special = spelled.startswith(("<|", "<｜")) and spelled.endswith(("|>", "｜>"))
    return bool(token.special) or looks_special or spelled in END_TOKENS


class SpelledTokens:
    """Keeps control tokens that messages spell apart from those that a chat template writes.

    Before the template is filled, the first character of each spelled one is replaced by a stand-in. The
    tokenizer finds no token there, and then reads the stand-in as the character.

    Args:
        backend: the tokenizer; it stays as it is.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._control = {token.content for token in added if token.content and is_control(token)}
        self._beginning = re.compile(f"(?={any_of(self._control)}).", re.DOTALL)
        first = sorted({token[0] for token in self._control})
        self._stand_in_of = {character: chr(_STAND_INS + number) for number, character in enumerate(first)}
        self._id_of: dict[int, int] = {}  # of added tokens, where the reader numbers them otherwise

    def hide(self, value: Any) -> Any:
        """A message, or a part of one, with stand-ins in every text."""
        if isinstance(value, str):
            return self._beginning.sub(lambda found: self._stand_in_of[found[0]], value)
        if isinstance(value, Mapping):
            return {key: self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list) else value

    def show(self, text: str) -> str:
        """A text with the characters that stand-ins stand for."""
        for character, stand_in in self._stand_in_of.items():
            text = text.replace(stand_in, character)
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of a text with stand-ins; nothing is put around it."""
        if not any(stand_in in text for stand_in in self._stand_in_of.values()):
            plain: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return plain
        return [self._id_of.get(i, i) for i in self._reader.encode(text, add_special_tokens=False).ids]

    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Ids (N,) of texts with stand-ins, and the character (N,) at which each begins; on all cores."""
        found = []
        for encoding in self._reader.encode_batch(list(texts), add_special_tokens=False):
            ids = np.array([self._id_of.get(i, i) for i in encoding.ids], dtype=np.int64)
            found.append((ids, np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)))
        return found

    @cached_property
    def _reader(self) -> tokenizers.Tokenizer:
        """A copy whose normalizer, which acts after tokens were found, takes out the stand-ins."""
        state = json.loads(self._backend.to_str())  # noqa: TID251 - the library's own
        added = state["added_tokens"]
        for token in added:  # these are looked for in the text as it is
            token["normalized"] = token["normalized"] and token["content"] not in self._control
        replaced = [
            {"type": "Replace", "pattern": {"String": stand_in}, "content": character}
            for character, stand_in in self._stand_in_of.items()
        ]
        before = [state["normalizer"]] if state["normalizer"] else []
        state["normalizer"] = {"type": "Sequence", "normalizers": [*replaced, *before]}
        state["post_processor"] = None
        hide_special_tokens(state)
        state["added_tokens"] = added
        reader = read_backend(json_text(state), "a tokenizer whose special tokens are text")
        found = {token["id"]: reader.token_to_id(token["content"]) for token in added}
        self._id_of = {number: token_id for token_id, number in found.items() if number is not None}
        return reader


def hide_special_tokens(state: dict[str, Any]) -> None:
    """Spell special tokens in the vocabulary of a tokenizer.json as no text does, where the model looks up
    whole words or pieces and could find them; their ids and all others stay."""
    model = state["model"]
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        return
    vocab = model["vocab"]
    kept = {model.get("unk_token")}  # the model finds it by its name
    listed = set(dict(vocab)) - kept
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    hidden = special & listed

    def spelled(entry: str) -> str:
        return _NEVER + entry if entry in hidden else entry

    if isinstance(vocab, list):
        model["vocab"] = [[spelled(entry), score] for entry, score in vocab]
    else:
        model["vocab"] = {spelled(entry): token_id for entry, token_id in vocab.items()}
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in hidden]
