"""The model's input to continue, and special tokens spelled in messages."""

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
# A character that no text contains, so that a token starting with it is never found in one.
_NEVER = "\ufdd0"
DEEPEST = 100  # nesting depth of a message
# The first placeholder, in a private-use plane.
_STAND_INS = 0xF0000


@dataclass(frozen=True)
class Prompt:
    """The model's input to continue."""

    text: str
    ids: tuple[int, ...]


def count_characters(value: Any, level: int = 0) -> int:
    """Characters of all texts in one or several messages.

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
    """A regular expression that finds tokens in a text, at each place the longest."""
    return "|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))) or "(?!)"


def is_control(token: tokenizers.AddedToken) -> bool:
    """Whether an added token controls a model: it is marked as special, or looks like a special token."""
    spelled = token.content
    looks_special = spelled.startswith(("<|", "<｜")) and spelled.endswith(("|>", "｜>"))
    return bool(token.special) or looks_special or spelled in END_TOKENS


class SpelledTokens:
    """Distinguishes control tokens spelled in messages from those that a chat template writes.

    Before the template is rendered, the first character of each spelled one is replaced by a placeholder. The
    tokenizer then finds no token there, and reads the placeholder as the character.

    Args:
        backend: the tokenizer; it is not changed.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._control = {token.content for token in added if token.content and is_control(token)}
        self._beginning = re.compile(f"(?={any_of(self._control)}).", re.DOTALL)
        first = sorted({token[0] for token in self._control})
        self._stand_in_of = {character: chr(_STAND_INS + number) for number, character in enumerate(first)}
        self._id_of: dict[int, int] = {}  # of added tokens, if the reader numbers them differently

    def hide(self, value: Any) -> Any:
        """A message, or a part of one, with placeholders in every text."""
        if isinstance(value, str):
            return self._beginning.sub(lambda found: self._stand_in_of[found[0]], value)
        if isinstance(value, Mapping):
            return {key: self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list) else value

    def show(self, text: str) -> str:
        """A text with its placeholders replaced by the original characters."""
        for character, stand_in in self._stand_in_of.items():
            text = text.replace(stand_in, character)
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of a text with placeholders, without tokens around it."""
        if not any(stand_in in text for stand_in in self._stand_in_of.values()):
            plain: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return plain
        return [self._id_of.get(i, i) for i in self._reader.encode(text, add_special_tokens=False).ids]

    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Ids (N,) of texts with placeholders, and the character (N,) at which each id begins; on all
        cores.
        """
        found = []
        for encoding in self._reader.encode_batch(list(texts), add_special_tokens=False):
            ids = np.array([self._id_of.get(i, i) for i in encoding.ids], dtype=np.int64)
            found.append((ids, np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)))
        return found

    @cached_property
    def _reader(self) -> tokenizers.Tokenizer:
        """A copy whose normalizer, which runs after tokens were found, removes the placeholders."""
        state = json.loads(self._backend.to_str())  # noqa: TID251 - the library's own
        added = state["added_tokens"]
        for token in added:  # these are matched in the original text
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
    """Rename special tokens in the vocabulary of a tokenizer.json to names that no text contains, for
    models that look up whole words or pieces and could find them; ids do not change.
    """
    model = state["model"]
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        return
    vocab = model["vocab"]
    kept = {model.get("unk_token")}  # the model finds it by name
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
