"""Continuous batching: requests join and leave between calls of the engine. Knows token ids only."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from smolctl.errors import SmolError
from smolctl.generation.engine import Cancellation, Engine, Logits
from smolctl.generation.lookup import MOST, Lookup
from smolctl.generation.sampling import SamplingSettings
from smolctl.generation.slots import Outcome, Reading, Request, Slot, Token, check_prompt, common_prefix

Speculation = Literal["auto", "off", "lookup"]
# What a new prompt takes over of the sequences in the cache. "exact": tokens with the bits that it would
# compute itself. "all": any tokens, of answers too, which are rounded differently.
Reuse = Literal["exact", "all"]

# Prompt tokens in one call of the engine: the sequences that decode wait that long at most. On SmolLM2-135M
# calls of 32, 64, 128 and 256 tokens read 780, 904, 982 and 1,022 tokens/s, calls of 64 in 71 ms (Zen 4, two
# threads, in turns; its AVX2 build: 546, 614, 636 and 661, in 104 ms). Smaller ones share more of a prompt.
CHUNK = 64
# Tokens of a call, drafts included, up to which one more costs far less than a call of its own.
DRAFTED = 8


@dataclass
class Counts:
    """What a scheduler has done so far."""

    prefilled: int = 0  # prompt tokens that went through the engine
    reused: int = 0  # prompt tokens that were in the cache already
    generated: int = 0  # tokens that were chosen
    steps: int = 0  # calls of the engine after the prompts
    drafted: int = 0  # draft tokens that went through the engine
    accepted: int = 0  # of these, the tokens that the model chose too


class Scheduler:
    """Sequences of one engine that decode together. One that ends makes room for the next.

    A request gets the same tokens alone and in company. So no call decodes more than the `exact_tokens` of
    the engine, and the length of a prompt alone decides how it is read (`Reading`). A round has one call for
    prompts, which goes to one of them in turn and has room for others where it can be shared, and a token for
    every sequence that decodes.

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
        reuse: Reuse = "exact",
    ) -> None:
        self.engine, self.settings = engine, settings
        self._speculates = speculation == "lookup" or (speculation == "auto" and engine.exact_tokens > 1)
        self._reuse = reuse
        # Up to so many tokens, a call rounds differently from calls of more; 0: all calls here are alike.
        self._few = engine.exact_tokens if engine.exact_tokens < CHUNK else 0
        self.capacity = capacity
        self.counts = Counts()  # of the latest run
        self._cache = engine.allocate(slots, capacity)
        self._slots: list[Slot | None] = [None] * slots
        self._waiting: deque[Request] = deque()
        # Those that the round still has to make: of slots that decode, or for prompts where it is empty.
        self._calls: deque[list[Slot]] = deque()
        self._turn = 0  # counts requests and calls for prompts
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
            slots = self._calls.popleft()
            reads, slots = not slots, [slot for slot in slots if not slot.ended]
            lengths = list(self._cache.lengths)
            try:
                if reads:
                    return self._read()
                if slots:
                    return self._decode(slots)
            except BaseException:  # Ctrl-C too: what the cache holds must stay what the slots say
                for number, length in enumerate(lengths):
                    self._cache.truncate(number, length)
                raise
        return []

    def _plan(self) -> bool:
        """Plan a round of calls; false when all sequences have ended."""
        if self._unread():
            self._calls.append([])
        decoding = [slot for slot in self._slots if slot is not None and not slot.ended and slot.has_begun]
        most = self.engine.exact_tokens
        self._calls += (decoding[at : at + most] for at in range(0, len(decoding), most))
        return bool(self._calls)

    def _unread(self) -> list[Slot]:
        """Slots whose prompts have not been read, in turn."""
        active = (slot for slot in self._slots if slot is not None and not slot.ended)
        return sorted((slot for slot in active if not slot.has_begun), key=lambda slot: slot.turn)

    def _occupy(self, request: Request) -> None:
        """Give a free slot to a request, the one that holds most of its prompt, or was used longest ago."""
        free = [number for number, slot in enumerate(self._slots) if slot is None or slot.ended]
        reading = self._way_of_reading(request)
        held = {
            number: self._reusable(self._slots[number], self._cache.lengths[number], request, reading)
            for number in free
        }
        number = max(free, key=lambda number: (held[number], -self._last_turn(number)))
        before, self._turn = self._slots[number], self._turn + 1
        self._slots[number] = slot = Slot(
            number,
            request,
            min(len(request.prompt) + request.max_tokens, self.capacity),
            list(request.prompt),
            request.sampling or self.settings,
            reading,
            Lookup(request.prompt) if self._speculates else None,
            self.engine.exact_tokens == 1,
            self._turn,
        )
        self._cache.truncate(number, held[number])
        self._take_row(slot, before)

    def _last_turn(self, number: int) -> int:
        slot = self._slots[number]
        return slot.turn if slot else 0

    def _way_of_reading(self, request: Request) -> Reading:
        if request.score or not self.engine.is_uniform:
            return Reading.CHUNKS
        return Reading.FEW if len(request.prompt) <= self._few else Reading.MANY

    def _reusable(self, holder: Slot | None, length: int, request: Request, reading: Reading) -> int:
        """How many tokens of a prompt can be taken over from a slot with `length` tokens in the cache."""
        if holder is None or request.score:
            return 0
        prompt, theirs = request.prompt, holder.request.prompt
        if holder.row is not None and length >= len(prompt) and tuple(prompt) == tuple(theirs):
            return len(prompt)
        # The last token of a prompt is read: its logits are what comes next.
        if self._reuse == "all":
            return common_prefix(holder.tokens[:length], prompt[:-1])
        common, ways = common_prefix(theirs[:length], prompt[:-1]), {holder.reading, reading}
        if Reading.CHUNKS in ways:  # a whole chunk is many tokens
            return 0 if Reading.FEW in ways else common // CHUNK * CHUNK
        return common if len(ways) == 1 else 0

    def _offers(self, holder: Slot, length: int, slot: Slot) -> int:
        """The same for a slot that has begun to read; 0 where it is not more than that."""
        has, prompt = self._cache.lengths[slot.number], slot.request.prompt
        if holder is slot or has >= min(length, len(prompt)) or holder.tokens[has] != prompt[has]:
            return 0
        found = self._reusable(holder, length, slot.request, slot.reading)
        return found if found > has else 0

    def _take_over(self, slot: Slot) -> None:
        """Copy what other slots have read of a prompt by now, where that is more."""
        for holder in filter(None, self._slots):
            if length := self._offers(holder, self._cache.lengths[holder.number], slot):
                self._cache.copy(holder.number, slot.number)
                self._cache.truncate(slot.number, length)
                self._take_row(slot, holder)

    def _take_row(self, slot: Slot, holder: Slot | None) -> None:
        if holder is not None and self._cache.lengths[slot.number] == len(slot.request.prompt):
            slot.row = holder.row

    def _read(self) -> list[Outcome]:
        """Read a part of one prompt, or of several; behind their last tokens, choose the first ones."""
        parts = self._parts()
        scores = any(slot.request.score for slot in parts)
        unread = {slot.number: part for slot, part in parts.items() if part}
        logits = iter(self._forward(unread, every=scores) if unread else ())
        found: list[Outcome] = []
        for slot, part in sorted(parts.items(), key=lambda item: item[0].number):
            prompt, end = slot.request.prompt, self._cache.lengths[slot.number]
            rows = [next(logits) for _ in (part if scores else part[:1])]
            self.counts.prefilled += len(part)
            slot.read += len(part)
            if scores:
                scored = rows if slot.row is None else [slot.row, *rows]
                found += self._attempt(slot, slot.score(scored[:-1], prompt[max(end - len(part), 1) : end]))
            if part:
                slot.row = rows[-1] if scores or end == len(prompt) else None
            if slot.row is not None and end == len(prompt) and not slot.ended:
                self.counts.reused += max(len(prompt) - slot.read, 0)
                found += self._attempt(slot, map(slot.choose, [slot.row]))
                if scores:
                    slot.row = None  # of a call for many rows, which are rounded differently
        return found

    def _parts(self) -> dict[Slot, Sequence[int]]:
        """What the next call for prompts reads, nothing of one that was taken over whole.

        A prompt waits that can soon take over what another reads in that call.
        """
        parts: dict[Slot, Sequence[int]] = {}
        first, room = None, 0  # the prompt whose turn it is
        for slot in self._unread():
            self._take_over(slot)
            begin, prompt = self._cache.lengths[slot.number], slot.request.prompt
            if begin == len(prompt):
                parts[slot] = ()
            elif first is None:
                first, self._turn = slot, self._turn + 1
                slot.turn, room = self._turn, self._most(slot, len(prompt) - begin)
                parts[slot] = prompt[begin : begin + room]
            elif (left := room - sum(map(len, parts.values()))) and self._joins(slot, parts):
                parts[slot] = prompt[begin : begin + left]
        missing = self._few + 1 - sum(map(len, parts.values()))
        if first and first.reading is Reading.MANY and self._reuse == "exact" and missing > 0:
            # So few tokens would be rounded differently: some are read again.
            begin = self._cache.lengths[first.number] - missing
            parts[first] = first.request.prompt[begin : begin + missing + len(parts[first])]
            self._cache.truncate(first.number, begin)
        return parts

    def _most(self, slot: Slot, left: int) -> int:
        """Tokens that a call for prompts has at most, by the one whose turn it is and what is left of it."""
        if slot.reading is Reading.CHUNKS:
            return CHUNK - self._cache.lengths[slot.number] % CHUNK
        if slot.reading is Reading.FEW:
            return self._few
        # What is left for the next call must not be few.
        return left - self._few - 1 if CHUNK < left <= CHUNK + self._few else CHUNK

    def _joins(self, slot: Slot, parts: Mapping[Slot, Sequence[int]]) -> bool:
        """Whether a prompt may share the call that reads these parts, and gains by it."""
        ways = {other.reading for other, part in parts.items() if part}
        if slot.reading is Reading.CHUNKS or ways != {slot.reading} or len(parts) == self._few:
            return False  # as many rows of logits as can be exact
        lengths = self._cache.lengths
        ends = ((other, lengths[other.number] + len(part)) for other, part in parts.items())
        return not any(self._offers(other, end, slot) for other, end in ends)

    def _decode(self, slots: Sequence[Slot]) -> list[Outcome]:
        """Read the last token and the draft of every sequence, and choose the tokens that follow."""
        exact = self.engine.exact_tokens
        most = max(min(exact, DRAFTED) // len(slots) - 1, 0) if exact > 1 else MOST
        for slot in slots:
            slot.make_draft(most)
        drafted = sum(len(slot.draft) for slot in slots)
        unread = {slot.number: [slot.tokens[-1], *slot.draft] for slot in slots}
        logits = iter(self._forward(unread, every=drafted > 0))
        self.counts.steps += 1
        self.counts.drafted += drafted
        found: list[Outcome] = []
        for slot in sorted(slots, key=lambda slot: slot.number):
            rows = [next(logits) for _ in unread[slot.number]]
            tokens = list(self._attempt(slot, slot.verify(rows)))
            self.counts.accepted += max(len(tokens) - 1, 0)
            self._cache.truncate(slot.number, len(slot.tokens) - 1)
            found += tokens
        return found

    def _attempt(self, slot: Slot, tokens: Iterable[Token]) -> Iterator[Outcome]:
        """The tokens of a request, and the error that ends it where there is one."""
        try:
            for token in tokens:
                self.counts.generated += not token.of_prompt
                yield slot.request, token
        except SmolError as error:
            slot.ended = True
            yield slot.request, error

    def _forward(self, unread: Mapping[int, Sequence[int]], every: bool) -> Logits:
        tokens = [unread.get(number, ()) for number in range(len(self._slots))]
        return self.engine.forward(tokens, self._cache, every)
