"""Draft tokens for speculative decoding, looked up in the text so far (prompt lookup: Saxena, 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

# A draft is the text that followed the latest earlier occurrence of the last tokens. Longer matches are tried
# first. Each match length has its own acceptance rate, the share of draft tokens that were correct, which
# starts at these values.
FIRST_RATES = {8: 0.9, 5: 0.8, 3: 0.5, 2: 0.2}
# The acceptance rate is a running mean over about this many tokens.
MEMORY = 8
# The cost of one more token in the same call, as a fraction of a call for a single token. A draft token is
# worth its cost if it is accepted at least this often.
COST_OF_A_TOKEN = 0.45
MOST = 16  # tokens in one draft


class Lookup:
    """Tracks the tokens of one sequence and drafts the next ones.

    The rates are updated with every token, even if nothing was drafted, so text that starts to repeat itself
    is noticed at no cost.

    Args:
        prompt: the first tokens, for which nothing is drafted.
    """

    def __init__(self, prompt: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.rates = dict(FIRST_RATES)
        # n consecutive tokens -> the position after their latest occurrence
        self._places: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in FIRST_RATES}
        for token in prompt:
            self._learn(token)

    def add(self, token: int) -> None:
        """Take the next token of the sequence."""
        matched, place = self._match()
        if matched:
            right = self.tokens[place] == token
            self.rates[matched] += (right - self.rates[matched]) / MEMORY
        self._learn(token)

    def _learn(self, token: int) -> None:
        for n, places in self._places.items():
            if len(self.tokens) >= n:
                places[tuple(self.tokens[-n:])] = len(self.tokens)
        self.tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """At most `most` tokens that may come next, only as many as are worth their cost; often none."""
        matched, place = self._match()
        count = min(most, MOST, self._worthwhile(self.rates[matched])) if matched else 0
        drafted: list[int] = []
        for at in range(place, place + count):  # a draft may continue into itself: "ababab"
            behind = at - len(self.tokens)
            drafted.append(self.tokens[at] if behind < 0 else drafted[behind])
        return drafted

    def _match(self) -> tuple[int, int]:
        """Length of the longest match of the last tokens (0: no match), and the position after it."""
        for n, places in self._places.items():
            place = places.get(tuple(self.tokens[-n:]))
            if place is not None:
                return n, place
        return 0, 0

    @staticmethod
    def _worthwhile(rate: float) -> int:
        """The largest n for which n consecutive draft tokens are accepted often enough."""
        if rate <= COST_OF_A_TOKEN:
            return 0
        return MOST if rate >= 1 else min(MOST, int(math.log(COST_OF_A_TOKEN) / math.log(rate)))
