"""Continuous batching: prefill prompts, decode their sequences together. Knows token ids only."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from smolctl.errors import InputError, PromptTooLongError
from smolctl.generation.engine import Cancellation, Engine, Logits
from smolctl.generation.lookup import MOST, Lookup
from smolctl.generation.sampling import (
    SamplingSettings,
    choose,
    likeliest,
    log_normalizer,
    margin,
    penalize_repetition,
)

Speculation = Literal["auto", "off", "lookup"]

# For greedy decoding on engines that round the logits of several tokens in one call differently from those of
# one. Where the likeliest two tokens are closer than this (in nats, ten times what rounding does), no draft
# token is accepted or rejected: the last token is read again by itself.
NEAR_TIE = 0.01
# Tokens that must be saved before what several texts begin with is read by itself: that is one more pass over
# the weights, which takes as long as a dozen tokens do.
WORTH = 16


@dataclass(frozen=True)
class Token:
    """A token that was chosen."""

    id: int
    logprob: float  # nats, under the unmodified model
    # The likeliest others with their probabilities, under the unmodified model, where asked for.
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Args:
        prompt: token ids, at least one.
        max_tokens: at most this many more; cut where the context ends.
        generator: the only source of randomness, this request's own.
        sampling: how its tokens are chosen; None: as the scheduler says.
    """

    prompt: Sequence[int]
    max_tokens: int
    generator: Random
    sampling: SamplingSettings | None = None


@dataclass
class Counts:
    """What a run has done so far."""

    prefilled: int = 0  # prompt tokens that went through the engine
    reused: int = 0  # prompt tokens that were in the cache already
    steps: int = 0  # calls of the engine after the prompts
    drafted: int = 0  # draft tokens that went through the engine
    accepted: int = 0  # of these, the tokens that the model chose too


@dataclass
class _Slot:
    """A sequence of the cache and the request that it continues."""

    number: int
    request: Request
    index: int  # of the request
    limit: int  # tokens in all, prompt included
    tokens: list[int]  # prompt and what was chosen
    lookup: Lookup | None
    sampling: SamplingSettings
    careful: bool = False  # no draft in the next step
    ended: bool = False
    draft: list[int] = field(default_factory=list)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self.lookup is not None:
            self.lookup.add(token)
        self.ended = self.ended or len(self.tokens) >= self.limit


class Scheduler:
    """Sequences of one engine that decode together; one that ends makes room for the next.

    Args:
        engine: the model.
        slots: sequences at once.
        capacity: tokens of the longest sequence, prompt included.
        settings: how a token is chosen, where a request does not say it.
        speculation: whether draft tokens are looked up in the text so far and several checked in one call.
            "auto": where that gives every token the bits it would have had without.
        alternatives: how many other tokens to report with each.

    Raises:
        InputError: more tokens than the model has positions for.
    """

    def __init__(
        self,
        engine: Engine,
        slots: int,
        capacity: int,
        settings: SamplingSettings,
        speculation: Speculation = "auto",
        alternatives: int = 0,
    ) -> None:
        self.engine, self.settings = engine, settings
        self.alternatives = alternatives
        self._speculates = speculation == "lookup" or (speculation == "auto" and engine.exact_tokens > 1)
        self.capacity = capacity
        self.counts = Counts()  # of the latest run
        self._cache = engine.allocate(slots, capacity)
        self._held: list[list[int]] = [[] for _ in range(slots)]  # what was last written to each slot
        self._slots: list[_Slot | None] = [None] * slots
        self._step_lock = threading.Lock()

    def run(
        self, requests: Sequence[Request], keep: bool = False, cancellation: Cancellation | None = None
    ) -> Iterator[list[tuple[int, Token]]]:
        """Continue every request; an item holds what one call of the engine gave: (index of request, token).

        A request's tokens come in order. The other requests change no more than how the engine rounds. Tokens
        that come in one item after `end` of their request are to be ignored.

        A run cancels the one before it and waits until that has left the engine: an abandoned run, in this
        thread or another, never disturbs the next.

        Args:
            requests: what to continue, started in order.
            keep: do not read again what a slot holds of the new prompt already.
            cancellation: of this run only.

        Raises:
            InputError: a prompt is empty or leaves no room in the model's context.
            CancelledError: `cancellation` was set, or another run began.
        """
        for request in requests:
            check_prompt(len(request.prompt), min(self.capacity, self.engine.config.max_position_embeddings))
        waiting = deque(enumerate(requests))
        cancellation = cancellation or Cancellation()
        self._cache.cancellation.set()
        with self._step_lock:
            self._cache.cancellation.set()  # another one, if a third thread was faster
            self._cache.cancellation = cancellation
            self.counts = Counts()
            self._slots = [None] * len(self._slots)
        while True:
            with self._step_lock:
                cancellation.check()
                chosen = self._step(waiting, keep)
                ended = not any(self._slots)
            if ended:
                return
            yield chosen

    def end(self, request: Request) -> None:
        """A request needs no more tokens."""
        for slot in self._slots:
            if slot is not None and slot.request is request:
                slot.ended = True

    def _step(self, waiting: deque[tuple[int, Request]], keep: bool) -> list[tuple[int, Token]]:
        """Call the engine once for the sequences in the slots and choose tokens; none when all have ended."""
        free = [number for number, slot in enumerate(self._slots) if slot is None or slot.ended]
        started = [self._occupy(number, *waiting.popleft(), keep) for number in free if waiting]
        for number in free[len(started) :]:
            self._slots[number] = None
        active = [slot for slot in self._slots if slot is not None]
        lengths = list(self._cache.lengths)
        try:
            return self._prefill(started) if started else self._decode(active) if active else []
        except BaseException:  # Ctrl-C too: what the cache holds must stay what `_held` says
            for number, length in enumerate(lengths):
                self._cache.truncate(number, length)
            raise

    def _occupy(self, number: int, index: int, request: Request, keep: bool) -> _Slot:
        """Give a slot to a request."""
        limit = min(len(request.prompt) + request.max_tokens, self.capacity)
        lookup = Lookup(request.prompt) if self._speculates else None
        held = self._held[number][: self._cache.lengths[number]]
        # The last token of a prompt is always read: its logits are what comes next.
        common = common_prefix(held, request.prompt[:-1]) if keep else 0
        self._cache.truncate(number, common)
        sampling = request.sampling or self.settings
        slot = _Slot(number, request, index, limit, list(request.prompt), lookup, sampling)
        self._slots[number], self._held[number] = slot, slot.tokens
        return slot

    def _prefill(self, slots: Sequence[_Slot]) -> list[tuple[int, Token]]:
        """Read the prompts of new slots and choose their first tokens. What they share is read once."""
        first: dict[tuple[int, ...], _Slot] = {}
        for slot in slots:
            first.setdefault(tuple(slot.tokens), slot)
        self.counts.reused += sum(self._cache.lengths[slot.number] for slot in first.values())
        self._share_beginning(list(first.values()))
        lengths = self._cache.lengths
        unread = {slot.number: slot.tokens[lengths[slot.number] :] for slot in first.values()}
        self.counts.prefilled += sum(map(len, unread.values()))
        logits = self._forward(unread)
        rows = dict(zip(sorted(unread), logits, strict=True))
        chosen = []
        for slot in slots:
            source = first[tuple(slot.tokens)].number
            if source != slot.number:
                self._cache.copy(source, slot.number)
            chosen.append((slot.index, self._choose(slot, rows[source])))
        return chosen

    def _share_beginning(self, slots: Sequence[_Slot]) -> None:
        """Have the first slot read what different prompts all begin with, and the others copy it."""
        (source, *others), lengths = slots, self._cache.lengths
        shared = min((common_prefix(source.tokens[:-1], one.tokens[:-1]) for one in others), default=0)
        unread = shared - max(lengths[slot.number] for slot in slots)
        if unread * len(others) < WORTH:
            return
        tokens = source.tokens[lengths[source.number] : shared]
        self.counts.prefilled += len(tokens)
        self._forward({source.number: tokens})
        for slot in others:
            self._cache.copy(source.number, slot.number)

    def _decode(self, slots: Sequence[_Slot]) -> list[tuple[int, Token]]:
        """Read the last token and the draft of every sequence, and choose the tokens that follow."""
        exact = self.engine.exact_tokens
        most = exact // len(slots) - 1 if exact > 1 else MOST
        for slot in slots:
            room = min(most, slot.limit - len(slot.tokens) - 1)
            slot.draft = slot.lookup.draft(room) if slot.lookup and not slot.careful else []
            slot.careful = False
        drafted = sum(len(slot.draft) for slot in slots)
        unread = {slot.number: [slot.tokens[-1], *slot.draft] for slot in slots}
        logits = iter(self._forward(unread, every=drafted > 0))
        self.counts.steps += 1
        self.counts.drafted += drafted
        chosen = []
        for slot in slots:
            rows = [next(logits) for _ in unread[slot.number]]
            chosen += [(slot.index, token) for token in self._verify(slot, rows)]
        return chosen

    def _verify(self, slot: _Slot, rows: Sequence[Logits]) -> Iterator[Token]:
        """Choose after the last token and after every draft token that was accepted; forget the others."""
        for row, drafted in zip(rows, [*slot.draft, None], strict=True):
            if slot.draft and self._is_near_tie(slot, row):
                slot.careful = True
                # The last token is read again, by itself.
                self._cache.truncate(slot.number, len(slot.tokens) - 1)
                return
            token = self._choose(slot, row)
            yield token
            if token.id != drafted:
                break
            self.counts.accepted += 1
        self._cache.truncate(slot.number, len(slot.tokens) - 1)

    def _forward(self, unread: dict[int, list[int]], every: bool = False) -> Logits:
        tokens = [unread.get(number, []) for number in range(len(self._slots))]
        return self.engine.forward(tokens, self._cache, every)

    def _choose(self, slot: _Slot, row: Logits) -> Token:
        """Choose a token by one row of logits, (V,), and append it."""
        # First, because it refuses logits that are not finite.
        normalizer = log_normalizer(row)
        chosen = choose(row, slot.sampling, slot.request.generator, slot.tokens)
        others: tuple[tuple[int, float], ...] = ()
        if self.alternatives:
            top = likeliest(row, self.alternatives + 1).tolist()
            others = tuple((id, math.exp(float(row[id]) - normalizer)) for id in top if id != chosen)
        slot.append(chosen)
        return Token(chosen, min(float(row[chosen]) - normalizer, 0.0), others[: self.alternatives])

    def _is_near_tie(self, slot: _Slot, row: Logits) -> bool:
        if slot.sampling.temperature > 0 or self.engine.exact_tokens > 1:
            return False
        penalty = slot.sampling.repetition_penalty
        return margin(penalize_repetition(row, slot.tokens, penalty)) < NEAR_TIE


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
            f"the prompt has {length} tokens, the model's context holds {context}", "Shorten the prompt."
        )


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items two sequences begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
