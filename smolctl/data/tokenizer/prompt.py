"""What a model is given to continue, and special tokens that messages spell."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import tokenizers

from smolctl.escaping import json_text

SpecialTokens = Literal["text", "tokens"]
# A character that no text holds: what begins with it is never found in one.
_NEVER = "\ufdd0"
# A stand-in lies this far behind the character that it stands for: in a plane for private use.
_STAND_INS = 0xF0000


@dataclass(frozen=True)
class Prompt:
    """What a model continues."""

    text: str
    ids: tuple[int, ...]


def spelled_tokens(backend: tokenizers.Tokenizer) -> str:
    """A regular expression that finds special tokens in a text, of several at one place the longest.

    It finds nothing where the tokenizer has none.
    """
    added = backend.get_added_tokens_decoder().values()
    spelled = sorted((token.content for token in added if token.special), key=len, reverse=True)
    return "|".join(map(re.escape, spelled)) or "(?!)"


class SpelledTokens:
    """Keeps special tokens that messages spell apart from those that a chat template writes.

    Before the template is filled, the first character of each spelled one is replaced by a stand-in. The
    tokenizer finds no special token there, and then reads the stand-in as the character.

    Args:
        backend: the tokenizer; it stays as it is.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._beginning = re.compile(f"(?={spelled_tokens(backend)}).", re.DOTALL)
        added = backend.get_added_tokens_decoder().values()
        first = {token.content[0] for token in added if token.special and token.content}
        self._character_of = {chr(_STAND_INS + ord(character)): character for character in first}
        self._reader: tokenizers.Tokenizer | None = None  # made when it is needed
        self._id_of: dict[int, int] = {}  # of added tokens, where the reader numbers them otherwise

    def hide(self, value: Any) -> Any:
        """A message, or a part of one, with stand-ins in every text."""
        if isinstance(value, str):
            return self._beginning.sub(lambda found: chr(_STAND_INS + ord(found[0])), value)
        if isinstance(value, Mapping):
            return {key: self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list) else value

    def show(self, text: str) -> str:
        """A text with the characters that stand-ins stand for."""
        for stand_in, character in self._character_of.items():
            text = text.replace(stand_in, character)
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of a text with stand-ins; nothing is put around it."""
        if not any(stand_in in text for stand_in in self._character_of):
            plain: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return plain
        if self._reader is None:
            self._reader = self._make_reader()
        return [self._id_of.get(i, i) for i in self._reader.encode(text, add_special_tokens=False).ids]

    def _make_reader(self) -> tokenizers.Tokenizer:
        """A copy whose normalizer, which acts after special tokens were found, takes out the stand-ins."""
        state = json.loads(self._backend.to_str())
        added = state["added_tokens"]
        for token in added:  # a special one is looked for in the text as it is
            token["normalized"] = token["normalized"] and not token["special"]
        replaced = [
            {"type": "Replace", "pattern": {"String": stand_in}, "content": character}
            for stand_in, character in self._character_of.items()
        ]
        before = [state["normalizer"]] if state["normalizer"] else []
        state["normalizer"] = {"type": "Sequence", "normalizers": [*replaced, *before]}
        state["post_processor"] = None
        hide_special_tokens(state)
        state["added_tokens"] = added
        reader = tokenizers.Tokenizer.from_str(json_text(state))
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
