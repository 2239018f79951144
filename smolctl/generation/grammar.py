"""Answers that keep to a JSON schema: the tokens that may come next, by llguidance."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from smolctl.config import ModelConfig
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError, SmolError
from smolctl.escaping import json_text
from smolctl.extras import install_command
from smolctl.generation.engine import Logits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# Spaces where Python's json.dumps has them, and nowhere else: a small model that may write white space where
# it likes writes nothing else until its tokens are used up.
OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
# Keywords that llguidance 1.9 accepts and does not keep to (its issue 265).
NOT_KEPT = frozenset({"patternProperties"})
# Keywords whose value maps names of the user's own to schemas.
NAMED = ("properties", "$defs", "definitions")
CHANGE = "Change the schema, or ask for JSON in the prompt."


@dataclass(frozen=True)
class Grammar:
    """A JSON schema ready for one tokenizer."""

    matcher: LLMatcher  # at the beginning of an answer
    ends: Collection[int]  # ids that end one

    def constraint(self) -> SchemaConstraint:
        """A fresh constraint, for one answer."""
        return SchemaConstraint(self.matcher.deep_copy(), self.ends)


class SchemaConstraint:
    """A `Constraint` of one answer."""

    def __init__(self, matcher: LLMatcher, ends: Collection[int]) -> None:
        self._matcher, self._ends, self._ended = matcher, ends, False

    def mask(self, row: Logits) -> Logits:
        if self._ended:
            return row  # of a draft behind the end, which nobody reads
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=len(row), bitorder="little").view(bool)
        masked: Logits = np.where(allowed, row, np.float32(-np.inf))
        return masked

    def accept(self, token: int) -> None:
        if self._ended:
            return
        self._ended = token in self._ends
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SmolError(f"no token fits the JSON schema ({_reason(self._matcher)})", CHANGE)


def compile_schema(schema: Mapping[str, Any], tokenizer: Tokenizer, config: ModelConfig) -> Grammar:
    """A grammar of a JSON schema.

    Raises:
        InputError: it is not a JSON schema, or has a keyword that cannot be enforced, by name.
        SmolError: llguidance is not installed.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        hint = f"Install it: {install_command('serve')}"
        raise SmolError("answers that follow a JSON schema need the package llguidance", hint) from None
    if found := sorted(_keywords(schema) & NOT_KEPT):
        raise InputError(f"JSON schema: {found[0]} is not supported", CHANGE)
    source = LLMatcher.grammar_from_json_schema(json_text(dict(schema)), overrides=OPTIONS)
    ends = tokenizer.stop_token_ids(config)
    matcher = LLMatcher(_backend(tokenizer, config.vocab_size, ends), source, log_level=0)
    first = matcher.deep_copy()
    first.compute_bitmask()  # shows whether anything can be written by it
    if wrong := [*filter(None, [_reason(first)]), *matcher.get_grammar_warnings()]:
        raise InputError(f"JSON schema: {wrong[0]}", CHANGE)
    return Grammar(matcher, ends)


def _reason(matcher: LLMatcher) -> str:
    """Why a matcher goes no further, without the dump of its state; empty where it does."""
    return matcher.get_error().partition("<state>")[0].strip()


@lru_cache(maxsize=1)
def _backend(tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int]) -> LLTokenizer:
    """The tokenizer as llguidance knows it, which takes a second at 49,152 tokens."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=sorted(ends))


def _keywords(schema: Any) -> set[str]:
    """All keywords in a schema and in those within it; names of properties are none."""
    if isinstance(schema, list):
        return set[str]().union(*map(_keywords, schema))
    if not isinstance(schema, Mapping):
        return set()
    found = set(schema)
    for key, value in schema.items():
        named = key in NAMED and isinstance(value, Mapping)
        found |= _keywords(list(value.values()) if named else value)
    return found
