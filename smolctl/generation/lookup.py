"""Guesses at the tokens that come next, looked up in the text so far (Saxena, 2023: prompt lookup)."""

from __future__ import annotations

import math

# A guess continues the latest place where the last tokens stood before. Longer matches are tried first. Each
# length keeps its own share of guesses that came true; the numbers are what it starts from.
FIRST_RATES = {8: 0.9, 5: 0.8, 3: 0.5, 2: 0.2}
# Guesses looked back on: the share is a running mean over about this many.
MEMORY = 8
# What reading one more token in the same call costs, in calls for a single token. A guess is worth its place
# when it will come true at least this often.
COST_OF_A_GUESS = 0.45
MOST = 16  # tokens in one guess


class Lookup:
    """Learns the tokens of one sequence and guesses how they go on.

    The shares are updated for every token, also where no guess was made, so that a text that begins to repeat
    itself is found out at no cost.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.rates = dict(FIRST_RATES)
        # n tokens in a row -> the place right behind them, the latest one
        self._places: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in FIRST_RATES}

    def add(self, token: int) -> None:
        """Take the next token of the sequence."""
        matched, place = self._match()
        if matched:
            came_true = self.tokens[place] == token
            self.rates[matched] += (came_true - self.rates[matched]) / MEMORY
        self.learn(token)

    def learn(self, token: int) -> None:
        """Take a token of the prompt: nothing is guessed there."""
        for n, places in self._places.items():
            if len(self.tokens) >= n:
                places[tuple(self.tokens[-n:])] = len(self.tokens)
        self.tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens that may come next, as many as are worth reading; often none."""
        matched, place = self._match()
        count = min(most, MOST, self._worthwhile(self.rates[matched])) if matched else 0
        guessed: list[int] = []
        for at in range(place, place + count):  # a guess may run on into itself: "ababab"
            behind = at - len(self.tokens)
            guessed.append(self.tokens[at] if behind < 0 else guessed[behind])
        return guessed

    def _match(self) -> tuple[int, int]:
        """Length of the longest match of the last tokens, 0 for none, and the place behind it."""
        for n, places in self._places.items():
            place = places.get(tuple(self.tokens[-n:]))
            if place is not None:
                return n, place
        return 0, 0

    @staticmethod
    def _worthwhile(rate: float) -> int:
        """The largest n for which n guesses in a row come true often enough."""
        if rate <= COST_OF_A_GUESS:
            return 0
        return MOST if rate >= 1 else min(MOST, int(math.log(COST_OF_A_GUESS) / math.log(rate)))
