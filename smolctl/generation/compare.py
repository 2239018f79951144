"""Where the completions of several models differ, given the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.generation.answer import Completion, spell
from smolctl.generation.complete import CompletionResult
from smolctl.generation.load import LoadedModel
from smolctl.generation.slots import common_prefix


@dataclass(frozen=True)
class Divergence:
    """The first difference of a completion from the first model's."""

    token: int | None  # index of the first token that differs; None if the tokenizers differ
    character: int  # position in the text
    expected: str | None  # the first model's text there; None if it had ended
    found: str | None


def diverge(
    results: Sequence[tuple[LoadedModel, CompletionResult]],
) -> tuple[tuple[Divergence | None, ...], ...]:
    """For each model and each of its completions, the first difference from the first model's; None: no
    difference.

    The first model's own entries are None.
    """
    reference_model, reference = results[0]
    return tuple(
        tuple(
            _first_difference(reference_model.tokenizer, expected, model.tokenizer, found)
            for expected, found in zip(reference.completions, result.completions, strict=True)
        )
        for model, result in results
    )


def _first_difference(
    theirs: Tokenizer, expected: Completion, ours: Tokenizer, found: Completion
) -> Divergence | None:
    same_text = common_prefix(expected.text, found.text)
    if ours is not theirs and ours.sha256 != theirs.sha256:
        if expected.text == found.text:
            return None
        return Divergence(None, same_text, _word(expected.text[same_text:]), _word(found.text[same_text:]))
    if expected.tokens == found.tokens:
        return None
    at = common_prefix(expected.tokens, found.tokens)
    shown = len(ours.decode(found.tokens[:at]).rstrip("\ufffd"))
    pair = (spell(ours, c.tokens[at]) if at < len(c.tokens) else None for c in (expected, found))
    return Divergence(at, min(shown, same_text), *pair)


def _word(text: str) -> str | None:
    """The beginning of a text, up to its second word."""
    end = text.find(" ", 1)
    return (text if end < 0 else text[:end]) or None
