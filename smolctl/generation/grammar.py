"""Answers that follow a JSON schema: llguidance computes which tokens may come next."""

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
from smolctl.extras import missing_package
from smolctl.generation.engine import Logits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# White space as Python's json.dumps writes it, and nowhere else: a small model that may write white space
# anywhere writes nothing else until its maximum number of tokens is reached.
OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
# Keywords that llguidance 1.9 accepts but does not enforce (its issue 265).
NOT_KEPT = frozenset({"patternProperties"})
# Keywords whose value maps the user's own names to schemas.
NAMED = ("properties", "$defs", "definitions")
CHANGE = "Change the schema, or ask for JSON in the prompt."


@dataclass(frozen=True)
class Grammar:
    """A JSON schema compiled for one tokenizer."""

    matcher: LLMatcher  # at the start of an answer
    ends: Collection[int]  # ids that end an answer

    def constraint(self) -> SchemaConstraint:
        """A new constraint, for one answer."""
        return SchemaConstraint(self.matcher.deep_copy(), self.ends)


class SchemaConstraint:
    """A `Constraint` of one answer."""

    def __init__(self, matcher: LLMatcher, ends: Collection[int]) -> None:
        self._matcher, self._ends, self._ended = matcher, ends, False

    def mask(self, row: Logits) -> Logits:
        if self._ended:
            return row  # of a draft token after the end, which is never used
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
        MissingPackageError: llguidance is not installed.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise missing_package("llguidance", "serve", "answers that follow a JSON schema") from None
    if found := sorted(_keywords(schema) & NOT_KEPT):
        raise InputError(f"JSON schema: {found[0]} is not supported", CHANGE)
    source = LLMatcher.grammar_from_json_schema(json_text(dict(schema)), overrides=OPTIONS)
    ends = tokenizer.stop_token_ids(config)
    matcher = LLMatcher(_backend(tokenizer, config.vocab_size, ends), source, log_level=0)
    first = matcher.deep_copy()
    first.compute_bitmask()  # fails if no text matches the schema
    if wrong := [*filter(None, [_reason(first)]), *matcher.get_grammar_warnings()]:
        raise InputError(f"JSON schema: {wrong[0]}", CHANGE)
    return Grammar(matcher, ends)


def _reason(matcher: LLMatcher) -> str:
    """Why a matcher stopped with an error, without the dump of its state; empty if there is no error."""
    return matcher.get_error().partition("<state>")[0].strip()


@lru_cache(maxsize=1)
def _backend(tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int]) -> LLTokenizer:
    """The tokenizer in llguidance's form, which takes a second to build for 49,152 tokens."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=sorted(ends))


def _keywords(schema: Any) -> set[str]:
    """All keywords of a schema and its subschemas; names of properties do not count."""
    if isinstance(schema, list):
        return set[str]().union(*map(_keywords, schema))
    if not isinstance(schema, Mapping):
        return set()
    found = set(schema)
    for key, value in schema.items():
        named = key in NAMED and isinstance(value, Mapping)
        found |= _keywords(list(value.values()) if named else value)
    return found
