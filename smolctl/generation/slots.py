"""A request, and the sequence of the cache that continues it: drafts, chosen tokens, scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Protocol

from smolctl.errors import InputError, PromptTooLongError, SmolError
from smolctl.generation.engine import Logits
from smolctl.generation.lookup import Lookup
from smolctl.generation.sampling import (
    SamplingSettings,
    choose,
    likeliest,
    log_normalizer,
    margin,
    penalize_repetition,
)

# For greedy decoding on engines whose logits of several tokens in one call are rounded differently from those
# of one. If the two likeliest tokens are closer than this (in nats, ten times the rounding error), no draft
# token is accepted or rejected, and the last token is processed again alone.
NEAR_TIE = 0.01


@dataclass(frozen=True)
class Token:
    """A token that was chosen, or a prompt token that was scored."""

    id: int
    logprob: float  # nats, under the unmodified model
    # The likeliest other tokens with their probabilities, under the unmodified model, if requested.
    alternatives: tuple[tuple[int, float], ...] = ()
    of_prompt: bool = False


class Constraint(Protocol):
    """Decides which tokens may come next in one sequence."""

    def mask(self, row: Logits) -> Logits:
        """Logits, (V,), with which only allowed tokens can be chosen.

        Raises:
            SmolError: no token is allowed.
        """

    def accept(self, token: int) -> None:
        """Update the constraint with the chosen token."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue.

    Args:
        prompt: token ids, at least one.
        max_tokens: maximum number of new tokens; fewer at the end of the context.
        generator: the request's own and only source of randomness.
        sampling: how its tokens are chosen; None: the scheduler's settings.
        alternatives: how many other tokens to report with each token.
        score: also report the prompt's own tokens, except the first. Nothing is reused for it.
        constraint: the request's own; None: any token is allowed.
    """

    prompt: Sequence[int]
    max_tokens: int
    generator: Random
    sampling: SamplingSettings | None = None
    alternatives: int = 0
    score: bool = False
    constraint: Constraint | None = None


Outcome = tuple[Request, Token | SmolError]  # an error ends its request, but no other


class PrefillMode(Enum):
    """The kinds of calls that prefill a prompt, which determine how its keys and values are rounded."""

    CHUNKS = "calls of its own, with the same boundaries whatever is reused"
    FEW = "shared calls of at most the engine's exact tokens"
    MANY = "shared calls of more tokens"


@dataclass(eq=False)
class Slot:
    """A sequence of the cache and the request that it continues, or continued last."""

    number: int
    request: Request
    limit: int  # total tokens, prompt included
    tokens: list[int]  # prompt and chosen tokens
    sampling: SamplingSettings
    mode: PrefillMode
    lookup: Lookup | None  # drafts tokens
    rounds: bool  # whether logits after a draft token are rounded differently from those after a single token
    turn: int  # when its prompt last had its turn
    prefilled: int = 0  # prompt tokens that this slot processed itself
    careful: bool = False  # no draft in the next step
    ended: bool = False
    draft: list[int] = field(default_factory=list)
    row: Logits | None = None  # the logits (V,) after the last processed part of the prompt

    @property
    def has_begun(self) -> bool:
        """Whether its prompt has been processed."""
        return len(self.tokens) > len(self.request.prompt)

    def make_draft(self, most: int) -> None:
        """Draft the next tokens: as many as are worth their cost, at most `most`."""
        room = min(most, self.limit - len(self.tokens) - 1)
        self.draft = self.lookup.draft(room) if self.lookup and not self.careful else []
        self.careful = False

    def choose(self, row: Logits) -> Token:
        """Choose a token from one row of logits, (V,), and append it.

        Raises:
            SmolError: no token can be chosen.
        """
        normalizer = log_normalizer(row)  # first, because it checks that the logits are finite
        constraint = self.request.constraint
        allowed = row if constraint is None else constraint.mask(row)
        chosen = choose(allowed, self.sampling, self.request.generator, self.tokens)
        if constraint is not None:
            constraint.accept(chosen)
        self.tokens.append(chosen)
        if self.lookup is not None:
            self.lookup.add(chosen)
        self.ended = self.ended or len(self.tokens) >= self.limit
        return self._token(row, normalizer, chosen)

    def verify(self, rows: Sequence[Logits]) -> Iterator[Token]:
        """Choose a token after the last one and after every draft token that was correct.

        Args:
            rows: (1 + drafted, V).
        """
        for row, drafted in zip(rows, [*self.draft, None], strict=True):
            if self.draft and self._is_near_tie(row):
                self.careful = True
                return
            token = self.choose(row)
            yield token
            if token.id != drafted:
                return

    def score(self, rows: Sequence[Logits], tokens: Sequence[int]) -> Iterator[Token]:
        """Score prompt tokens, each by the row of logits, (V,), before it."""
        for row, token in zip(rows, tokens, strict=True):
            yield self._token(row, log_normalizer(row), token, of_prompt=True)

    def _token(self, row: Logits, normalizer: float, id: int, of_prompt: bool = False) -> Token:
        count = self.request.alternatives
        top = [one for one in likeliest(row, count + 1).tolist() if one != id] if count else []
        others = tuple((one, math.exp(float(row[one]) - normalizer)) for one in top[:count])
        return Token(id, min(float(row[id]) - normalizer, 0.0), others, of_prompt)

    def _is_near_tie(self, row: Logits) -> bool:
        if self.sampling.temperature > 0 or not self.rounds:
            return False
        return margin(penalize_repetition(row, self.tokens, self.sampling.repetition_penalty)) < NEAR_TIE


def check_prompt(length: int, context: int) -> None:
    """Refuse a prompt that is empty or leaves no room in the context.

    Raises:
        InputError: it is empty.
        PromptTooLongError: it leaves no room.
    """
    if length == 0:
        raise InputError("the prompt is empty", "Give --prompt some text.")
    if length >= context:
        raise PromptTooLongError(
            f"the prompt has {length} tokens, but the model's context holds {context}", "Shorten the prompt."
        )


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """The number of leading items that two sequences have in common."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
