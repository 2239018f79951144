"""Continuous batching: requests join and leave between calls of the engine. Knows token ids only."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from random import Random
from typing import Literal, Protocol

from smolctl.errors import InputError, PromptTooLongError, SmolError
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
# What a new prompt takes over of the sequences in the cache. "chunks": whole chunks of prompts, which have
# the bits that it would compute itself. "all": any number of tokens, of answers too, which round differently.
Reuse = Literal["chunks", "all"]

# Prompt tokens in one call of the engine: the sequences that decode wait that long at most. On SmolLM2-135M
# calls of 32, 64, 128 and 256 tokens read 780, 904, 982 and 1,022 tokens/s, calls of 64 in 71 ms (Zen 4, two
# threads, in turns; its AVX2 build: 546, 614, 636 and 661, in 104 ms). Smaller ones share more of a prompt.
CHUNK = 64
# For greedy decoding on engines that round the logits of several tokens in one call differently from those of
# one. Where the likeliest two tokens are closer than this (in nats, ten times what rounding does), no draft
# token is accepted or rejected: the last token is read again by itself.
NEAR_TIE = 0.01
# Tokens of a call, drafts included, up to which one more costs far less than a call of its own.
DRAFTED = 8


@dataclass(frozen=True)
class Token:
    """A token that was chosen, or one of the prompt that was scored."""

    id: int
    logprob: float  # nats, under the unmodified model
    # The likeliest others with their probabilities, under the unmodified model, where asked for.
    alternatives: tuple[tuple[int, float], ...] = ()
    of_prompt: bool = False


class Constraint(Protocol):
    """Says which tokens may come next in one sequence."""

    def mask(self, row: Logits) -> Logits:
        """Logits, (V,), in which no other token can be chosen.

        Raises:
            SmolError: nothing may come next.
        """

    def accept(self, token: int) -> None:
        """Take the token that was chosen."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue.

    Args:
        prompt: token ids, at least one.
        max_tokens: at most this many more; cut where the context ends.
        generator: the only source of randomness, this request's own.
        sampling: how its tokens are chosen; None: as the scheduler says.
        alternatives: how many other tokens to report with each.
        score: report the prompt's own tokens too, all but the first. Nothing is reused for it.
        constraint: this request's own; None: any token may come.
    """

    prompt: Sequence[int]
    max_tokens: int
    generator: Random
    sampling: SamplingSettings | None = None
    alternatives: int = 0
    score: bool = False
    constraint: Constraint | None = None


Outcome = tuple[Request, Token | SmolError]  # an error ends its request, and no other


@dataclass
class Counts:
    """What a scheduler has done so far."""

    prefilled: int = 0  # prompt tokens that went through the engine
    reused: int = 0  # prompt tokens that were in the cache already
    generated: int = 0  # tokens that were chosen
    steps: int = 0  # calls of the engine after the prompts
    drafted: int = 0  # draft tokens that went through the engine
    accepted: int = 0  # of these, the tokens that the model chose too


@dataclass
class _Slot:
    """A sequence of the cache and the request that it continues, or continued last."""

    number: int
    request: Request
    limit: int  # tokens in all, prompt included
    tokens: list[int]  # prompt and what was chosen
    lookup: Lookup | None
    sampling: SamplingSettings
    turn: int  # when its prompt was last given a call
    read: int = 0  # tokens of its prompt that it has read itself
    careful: bool = False  # no draft in the next step
    ended: bool = False
    draft: list[int] = field(default_factory=list)
    row: Logits | None = None  # the logits (V,) after what was read of the prompt last

    @property
    def has_begun(self) -> bool:
        """Whether its prompt has been read."""
        return len(self.tokens) > len(self.request.prompt)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self.lookup is not None:
            self.lookup.add(token)
        self.ended = self.ended or len(self.tokens) >= self.limit


class Scheduler:
    """Sequences of one engine that decode together. One that ends makes room for the next.

    A request gets the same tokens alone and in company. So its prompt is read in chunks that begin at
    multiples of `CHUNK`, each in a call of its own, and no call decodes more than the `exact_tokens` of the
    engine. In every round one prompt gets a chunk, in turn, and every sequence that decodes gets a token.

    Args:
        engine: the model.
        slots: sequences at once.
        capacity: tokens of the longest sequence, prompt included.
        settings: how a token is chosen, where a request does not say it.
        speculation: whether draft tokens are looked up in the text so far and several checked in one call.
            "auto": where that gives every token the bits it would have had without.
        reuse: what is not read again.

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
        reuse: Reuse = "chunks",
    ) -> None:
        self.engine, self.settings = engine, settings
        self._speculates = speculation == "lookup" or (speculation == "auto" and engine.exact_tokens > 1)
        self._reuse = reuse
        self.capacity = capacity
        self.counts = Counts()  # of the latest run
        self._cache = engine.allocate(slots, capacity)
        self._slots: list[_Slot | None] = [None] * slots
        self._waiting: deque[Request] = deque()
        self._calls: deque[list[_Slot]] = deque()  # those that the round still has to make
        self._turn = 0  # counts chunks of prompts
        self._step_lock = threading.Lock()

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        return sum(slot is not None and not slot.ended for slot in self._slots)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    def check(self, request: Request) -> None:
        """Refuse a request that can never run.

        Raises:
            InputError: its prompt is empty or leaves no room in the model's context.
        """
        check_prompt(len(request.prompt), min(self.capacity, self.engine.config.max_position_embeddings))

    def submit(self, request: Request) -> None:
        """Have a request continued by the next steps, behind those that were submitted before.

        Raises:
            InputError: see `check`.
        """
        self.check(request)
        self._waiting.append(request)

    def end(self, request: Request) -> None:
        """A request needs no more tokens."""
        for slot in self._slots:
            if slot is not None and slot.request is request:
                slot.ended = True
        if request in self._waiting:
            self._waiting.remove(request)

    def run(
        self, requests: Sequence[Request], cancellation: Cancellation | None = None
    ) -> Iterator[list[tuple[int, Token]]]:
        """Continue these requests; an item holds what one call of the engine gave: (index of request, token).

        A request's tokens come in order. Tokens that come in one item after `end` of their request are to be
        ignored.

        A run cancels the one before it and waits until that has left the engine: an abandoned run, in this
        thread or another, never disturbs the next.

        Args:
            requests: what to continue, started in order.
            cancellation: of this run only.

        Raises:
            SmolError: a request is refused, see `check`, or has failed.
            CancelledError: `cancellation` was set, or another run began.
        """
        for request in requests:
            self.check(request)
        indexes = {request: index for index, request in enumerate(requests)}
        cancellation = cancellation or Cancellation()
        self._cache.cancellation.set()
        with self._step_lock:
            self._cache.cancellation.set()  # another one, if a third thread was faster
            self._cache.cancellation = cancellation
            self.counts = Counts()
            self._waiting = deque(requests)
            for slot in filter(None, self._slots):
                slot.ended = True
        while True:
            with self._step_lock:
                cancellation.check()
                if not self.active and not self.waiting:
                    return
                chosen = self.step()
            tokens = []
            for request, outcome in chosen:
                if isinstance(outcome, SmolError):
                    raise outcome
                tokens.append((indexes[request], outcome))
            if tokens:
                yield tokens

    def step(self) -> list[Outcome]:
        """Call the engine once, at most, and choose tokens. Those of one request come in order.

        It gives nothing where a prompt was read in part, and where there is nothing to do.
        """
        while self._waiting and self.active < len(self._slots):
            self._occupy(self._waiting.popleft())
        while self._calls or self._plan():
            slots = [slot for slot in self._calls.popleft() if not slot.ended]
            if not slots:
                continue
            lengths = list(self._cache.lengths)
            try:
                return self._decode(slots) if slots[0].has_begun else self._read(slots[0])
            except BaseException:  # Ctrl-C too: what the cache holds must stay what the slots say
                for number, length in enumerate(lengths):
                    self._cache.truncate(number, length)
                raise
        return []

    def _plan(self) -> bool:
        """Plan a round of calls; false when all sequences have ended."""
        active = [slot for slot in self._slots if slot is not None and not slot.ended]
        reading = [slot for slot in active if not slot.has_begun]
        if reading:
            self._calls.append([min(reading, key=lambda slot: slot.turn)])
        decoding = [slot for slot in active if slot.has_begun]
        most = self.engine.exact_tokens
        self._calls += (decoding[at : at + most] for at in range(0, len(decoding), most))
        return bool(self._calls)

    def _occupy(self, request: Request) -> None:
        """Give a free slot to a request, the one that holds most of its prompt, or was used longest ago."""
        free = [number for number, slot in enumerate(self._slots) if slot is None or slot.ended]
        held = {number: self._reusable(self._slots[number], request) for number in free}
        number = max(free, key=lambda number: (held[number], -self._last_turn(number)))
        before, self._turn = self._slots[number], self._turn + 1
        self._slots[number] = slot = _Slot(
            number,
            request,
            min(len(request.prompt) + request.max_tokens, self.capacity),
            list(request.prompt),
            Lookup(request.prompt) if self._speculates else None,
            request.sampling or self.settings,
            self._turn,
        )
        self._cache.truncate(number, held[number])
        self._take_row(slot, before)

    def _last_turn(self, number: int) -> int:
        slot = self._slots[number]
        return slot.turn if slot else 0

    def _reusable(self, holder: _Slot | None, request: Request) -> int:
        """How many tokens of a prompt can be taken over from what a slot holds in the cache."""
        if holder is None or request.score:
            return 0
        length, prompt, theirs = self._cache.lengths[holder.number], request.prompt, holder.request.prompt
        if holder.row is not None and length >= len(prompt) and tuple(prompt) == tuple(theirs):
            return len(prompt)
        # The last token of a prompt is read: its logits are what comes next.
        if self._reuse == "all":
            return common_prefix(holder.tokens[:length], prompt[:-1])
        return common_prefix(theirs[:length], prompt[:-1]) // CHUNK * CHUNK

    def _take_over(self, slot: _Slot, holders: Iterable[_Slot]) -> None:
        """Copy what another slot has read of a prompt by now, where that is more."""
        for holder in holders:
            length = self._reusable(holder, slot.request)
            if length > self._cache.lengths[slot.number]:
                self._cache.copy(holder.number, slot.number)
                self._cache.truncate(slot.number, length)
                self._take_row(slot, holder)

    def _take_row(self, slot: _Slot, holder: _Slot | None) -> None:
        if holder is not None and self._cache.lengths[slot.number] == len(slot.request.prompt):
            slot.row = holder.row

    def _read(self, slot: _Slot) -> list[Outcome]:
        """Read a chunk of a prompt; behind the last one, choose the first token."""
        prompt, scores = slot.request.prompt, slot.request.score
        self._take_over(slot, (one for one in self._slots if one is not None and one is not slot))
        self._turn += 1
        slot.turn = self._turn
        found: list[Outcome] = []
        before = self._cache.lengths[slot.number]
        if before < len(prompt):
            tokens = list(prompt[before : before + CHUNK - before % CHUNK])
            logits = self._forward({slot.number: tokens}, every=scores)
            self.counts.prefilled += len(tokens)
            slot.read += len(tokens)
            if scores:
                rows = logits if slot.row is None else [slot.row, *logits]
                scored = prompt[max(before, 1) : before + len(tokens)]
                found += self._attempt(slot, map(self._score, repeat(slot), rows, scored))
            slot.row = logits[-1] if scores or before + len(tokens) == len(prompt) else None
        if slot.row is not None and self._cache.lengths[slot.number] == len(prompt) and not slot.ended:
            self.counts.reused += len(prompt) - slot.read
            found += self._attempt(slot, map(self._choose, [slot], [slot.row]))
            if scores:
                slot.row = None  # of a call for many rows, which are rounded differently
        return found

    def _decode(self, slots: Sequence[_Slot]) -> list[Outcome]:
        """Read the last token and the draft of every sequence, and choose the tokens that follow."""
        exact = self.engine.exact_tokens
        most = max(min(exact, DRAFTED) // len(slots) - 1, 0) if exact > 1 else MOST
        for slot in slots:
            room = min(most, slot.limit - len(slot.tokens) - 1)
            slot.draft = slot.lookup.draft(room) if slot.lookup and not slot.careful else []
            slot.careful = False
        drafted = sum(len(slot.draft) for slot in slots)
        unread = {slot.number: [slot.tokens[-1], *slot.draft] for slot in slots}
        logits = iter(self._forward(unread, every=drafted > 0))
        self.counts.steps += 1
        self.counts.drafted += drafted
        found: list[Outcome] = []
        for slot in sorted(slots, key=lambda slot: slot.number):
            rows = [next(logits) for _ in unread[slot.number]]
            found += self._attempt(slot, self._verify(slot, rows))
        return found

    def _attempt(self, slot: _Slot, tokens: Iterable[Token]) -> Iterator[Outcome]:
        """The tokens of a request, and the error that ends it where there is one."""
        try:
            for token in tokens:
                yield slot.request, token
        except SmolError as error:
            slot.ended = True
            yield slot.request, error

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
        normalizer = log_normalizer(row)  # first, because it refuses logits that are not finite
        constraint = slot.request.constraint
        allowed = row if constraint is None else constraint.mask(row)
        chosen = choose(allowed, slot.sampling, slot.request.generator, slot.tokens)
        if constraint is not None:
            constraint.accept(chosen)
        slot.append(chosen)
        self.counts.generated += 1
        return self._token(slot, row, normalizer, chosen)

    def _score(self, slot: _Slot, row: Logits, token: int) -> Token:
        """A token of the prompt by the row of logits, (V,), before it."""
        return self._token(slot, row, log_normalizer(row), token, of_prompt=True)

    def _token(self, slot: _Slot, row: Logits, normalizer: float, id: int, of_prompt: bool = False) -> Token:
        count = slot.request.alternatives
        top = [one for one in likeliest(row, count + 1).tolist() if one != id] if count else []
        others = tuple((one, math.exp(float(row[one]) - normalizer)) for one in top[:count])
        return Token(id, min(float(row[id]) - normalizer, 0.0), others, of_prompt)

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
