"""One answer while it is generated: its text, which part of it is final, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.generation.slots import Token


@dataclass(frozen=True)
class Alternative:
    """Another token that the model could have chosen there."""

    token: int
    text: str
    probability: float  # under the unmodified model


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # nats, under the unmodified model
    # "stop": end of text or a stop text; "length": max_tokens or the context's end; "interrupted": Ctrl-C
    finish_reason: str
    # For every token the likeliest other tokens, if they were requested.
    alternatives: tuple[tuple[Alternative, ...], ...] | None = None


class Answer:
    """Collects tokens and returns text as soon as it cannot change any more.

    Args:
        tokenizer: the model's own.
        prompt: ids that the answer continues.
        stop: texts that end the answer and are not part of it.
        ends: ids that end it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: tuple[str, ...], ends: frozenset[int]
    ) -> None:
        self._stream = tokenizer.stream(prompt)
        self._tokenizer = tokenizer
        self._stop, self._ends = tuple(text for text in stop if text), ends
        self._emitted = 0  # characters of the text that were returned
        self.text = ""  # decoded so far
        self.tokens: list[Token] = []
        self.finish_reason = ""

    def add(self, token: Token) -> str:
        """Add a token and return the text that became final with it."""
        self.tokens.append(token)
        if token.id in self._ends:
            return self._finish("stop")
        self.text += self._stream.feed(token.id)
        if self._cut():
            self.finish_reason = "stop"
            return self._emit(len(self.text))
        held = max((_overlap(self.text[self._emitted :], stop) for stop in self._stop), default=0)
        return self._emit(len(self.text) - held)

    def finish(self, reason: str = "length") -> str:
        """End the answer and return the text that was held back; after the end, returns nothing."""
        return "" if self.finish_reason else self._finish(reason)

    def completion(self) -> Completion:
        alternatives = tuple(
            tuple(
                Alternative(id, spell(self._tokenizer, id), probability)
                for id, probability in token.alternatives
            )
            for token in self.tokens
        )
        return Completion(
            self.text,
            tuple(token.id for token in self.tokens),
            tuple(token.logprob for token in self.tokens),
            self.finish_reason,
            alternatives if any(alternatives) else None,
        )

    def _finish(self, reason: str) -> str:
        self.finish_reason = reason
        self.text += self._stream.finish()
        self._cut()  # what was held back may complete a stop text
        return self._emit(len(self.text))

    def _cut(self) -> bool:
        """Cut the text before the first stop text in it, if there is one."""
        found = [(self.text.find(stop, self._emitted), stop) for stop in self._stop]
        # The first stop text to be complete counts, however the text is divided into tokens.
        places = [(at + len(stop), at) for at, stop in found if at >= 0]
        if places:
            self.text = self.text[: min(places)[1]]
        return bool(places)

    def _emit(self, end: int) -> str:
        fresh = self.text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return fresh


def spell(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token alone; bytes that are not a whole character are shown as \\xe2."""
    spelled = tokenizer.bytes_of(token)
    return f"<{token}>" if spelled is None else spelled.decode("utf-8", "backslashreplace")


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, and which may therefore become it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
