"""Continuous batching: requests join and leave between calls of the engine. Works on token ids only."""

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
from smolctl.generation.slots import Outcome, PrefillMode, Request, Slot, Token, check_prompt, common_prefix

Speculation = Literal["auto", "off", "lookup"]
# What a new prompt reuses from sequences in the cache. "exact": tokens with the bits that the prompt would
# compute itself. "all": any tokens, also those of answers, which are rounded differently.
Reuse = Literal["exact", "all"]

# Maximum prompt tokens per call of the engine: sequences that decode wait at most that long. On SmolLM2-135M,
# calls of 32, 64, 128 and 256 tokens process 780, 904, 982 and 1,022 tokens/s, and a call of 64 takes 71 ms
# (Zen 4, two threads, in turns; with the AVX2 build 546, 614, 636 and 661, and 104 ms). Smaller calls let
# prompts share more of a common prefix.
CHUNK = 64
# Up to this many tokens per call, drafts included, one more token costs far less than a call of its own.
DRAFTED = 8


@dataclass
class Counts:
    """What a scheduler has done so far."""

    prefilled: int = 0  # prompt tokens that the engine processed
    reused: int = 0  # prompt tokens that were already in the cache
    generated: int = 0  # tokens that were chosen
    steps: int = 0  # calls of the engine after the prompts
    drafted: int = 0  # draft tokens that the engine processed
    accepted: int = 0  # draft tokens that equal the model's choice


class Scheduler:
    """Sequences of one engine that decode together. When one ends, the next request takes its place.

    A request gets the same tokens alone and in a batch. Therefore no call decodes more than the engine's
    `exact_tokens`, and the calls that prefill a prompt depend only on its length (`PrefillMode`). A round has
    one call for prompts, which serves one prompt in turn and others if the call can be shared, and decodes
    one token for every sequence.

    Args:
        engine: the model.
        slots: maximum number of concurrent sequences.
        capacity: tokens of the longest sequence, prompt included.
        settings: sampling settings of requests that have none.
        speculation: whether draft tokens are looked up in the text so far and several are checked in one
            call. "auto": if every token gets the same bits as without.
        reuse: which cached tokens are not processed again.

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
        # Calls of up to this many tokens round differently from larger calls; 0: all calls round alike.
        self._few = engine.exact_tokens if engine.exact_tokens < CHUNK else 0
        self.capacity = capacity
        self.counts = Counts()  # of the latest run
        self._cache = engine.allocate(slots, capacity)
        self._slots: list[Slot | None] = [None] * slots
        self._waiting: deque[Request] = deque()
        # Calls that the round still has to make: for decoding slots, or for prompts if the list is empty.
        self._calls: deque[list[Slot]] = deque()
        self._turn = 0  # counts requests, and calls for prompts
        self._step_lock = threading.Lock()

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        return sum(slot is not None and not slot.ended for slot in self._slots)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def check(self, request: Request) -> None:
        """Refuse a request that cannot run.

        Raises:
            InputError: its prompt is empty or leaves no room in the model's context.
        """
        check_prompt(len(request.prompt), min(self.capacity, self.engine.config.max_position_embeddings))

    def submit(self, request: Request) -> None:
        """Queue a request, which the next steps continue after those submitted before.

        Raises:
            InputError: see `check`.
        """
        self.check(request)
        self._waiting.append(request)

    def end(self, request: Request) -> None:
        """End a request that needs no more tokens."""
        for slot in self._slots:
            if slot is not None and slot.request is request:
                slot.ended = True
        if request in self._waiting:
            self._waiting.remove(request)

    def run(
        self, requests: Sequence[Request], cancellation: Cancellation | None = None
    ) -> Iterator[list[tuple[int, Token]]]:
        """Continue these requests; each item holds the results of one call of the engine: (index of request,
        token).

        A request's tokens come in order. Tokens in the same item after the `end` of their request must be
        ignored.

        A run cancels the previous run and waits until it has left the engine, so an abandoned run, in this or
        another thread, never disturbs the next.

        Args:
            requests: what to continue, started in order.
            cancellation: of this run only.

        Raises:
            SmolError: a request is refused (see `check`), or has failed.
            CancelledError: `cancellation` was set, or another run started.
        """
        for request in requests:
            self.check(request)
        indexes = {request: index for index, request in enumerate(requests)}
        cancellation = cancellation or Cancellation()
        self._cache.cancellation.set()
        with self._step_lock:
            self._cache.cancellation.set()  # of another run, if a third thread was faster
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
        """Call the engine at most once, and choose tokens. Those of one request come in order.

        Returns nothing if a prompt was only partly processed, or if there is nothing to do.
        """
        while self._waiting and self.active < len(self._slots):
            self._occupy(self._waiting.popleft())
        while self._calls or self._plan():
            slots = self._calls.popleft()
            reads, slots = not slots, [slot for slot in slots if not slot.ended]
            lengths = list(self._cache.lengths)
            try:
                if reads:
                    return self._prefill()
                if slots:
                    return self._decode(slots)
            except BaseException:  # including Ctrl-C: cache and slots must stay consistent
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
        """Slots whose prompts have not been processed, in turn."""
        active = (slot for slot in self._slots if slot is not None and not slot.ended)
        return sorted((slot for slot in active if not slot.has_begun), key=lambda slot: slot.turn)

    def _occupy(self, request: Request) -> None:
        """Give a request a slot: the free one whose cache has most of its prompt, or was used longest ago."""
        free = [number for number, slot in enumerate(self._slots) if slot is None or slot.ended]
        mode = self._prefill_mode(request)
        held = {
            number: self._reusable(self._slots[number], self._cache.lengths[number], request, mode)
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
            mode,
            Lookup(request.prompt) if self._speculates else None,
            self.engine.exact_tokens == 1,
            self._turn,
        )
        self._cache.truncate(number, held[number])
        self._take_row(slot, before)

    def _last_turn(self, number: int) -> int:
        slot = self._slots[number]
        return slot.turn if slot else 0

    def _prefill_mode(self, request: Request) -> PrefillMode:
        if request.score or not self.engine.is_uniform:
            return PrefillMode.CHUNKS
        return PrefillMode.FEW if len(request.prompt) <= self._few else PrefillMode.MANY

    def _reusable(self, holder: Slot | None, length: int, request: Request, mode: PrefillMode) -> int:
        """How many tokens of a prompt can be reused from a slot with `length` tokens in the cache."""
        if holder is None or request.score:
            return 0
        prompt, theirs = request.prompt, holder.request.prompt
        if holder.row is not None and length >= len(prompt) and tuple(prompt) == tuple(theirs):
            return len(prompt)
        # The last token of a prompt is always processed, because its logits choose the next one.
        if self._reuse == "all":
            return common_prefix(holder.tokens[:length], prompt[:-1])
        common, modes = common_prefix(theirs[:length], prompt[:-1]), {holder.mode, mode}
        if PrefillMode.CHUNKS in modes:  # a whole chunk counts as many tokens
            return 0 if PrefillMode.FEW in modes else common // CHUNK * CHUNK
        return common if len(modes) == 1 else 0

    def _offers(self, holder: Slot, length: int, slot: Slot) -> int:
        """`_reusable` for a slot that has started its prompt; 0 if that is not more than it already has."""
        has, prompt = self._cache.lengths[slot.number], slot.request.prompt
        if holder is slot or has >= min(length, len(prompt)) or holder.tokens[has] != prompt[has]:
            return 0
        found = self._reusable(holder, length, slot.request, slot.mode)
        return found if found > has else 0

    def _take_over(self, slot: Slot) -> None:
        """Copy what other slots have processed of a prompt so far, if that is more."""
        for holder in filter(None, self._slots):
            if length := self._offers(holder, self._cache.lengths[holder.number], slot):
                self._cache.copy(holder.number, slot.number)
                self._cache.truncate(slot.number, length)
                self._take_row(slot, holder)

    def _take_row(self, slot: Slot, holder: Slot | None) -> None:
        if holder is not None and self._cache.lengths[slot.number] == len(slot.request.prompt):
            slot.row = holder.row

    def _prefill(self) -> list[Outcome]:
        """Process a part of one prompt or of several; after their last tokens, choose the first ones."""
        parts = self._parts()
        scores = any(slot.request.score for slot in parts)
        unread = {slot.number: part for slot, part in parts.items() if part}
        logits = iter(self._forward(unread, every=scores) if unread else ())
        found: list[Outcome] = []
        for slot, part in sorted(parts.items(), key=lambda item: item[0].number):
            prompt, end = slot.request.prompt, self._cache.lengths[slot.number]
            rows = [next(logits) for _ in (part if scores else part[:1])]
            self.counts.prefilled += len(part)
            slot.prefilled += len(part)
            if scores:
                scored = rows if slot.row is None else [slot.row, *rows]
                found += self._outcomes(slot, slot.score(scored[:-1], prompt[max(end - len(part), 1) : end]))
            if part:
                slot.row = rows[-1] if scores or end == len(prompt) else None
            if slot.row is not None and end == len(prompt) and not slot.ended:
                self.counts.reused += max(len(prompt) - slot.prefilled, 0)
                found += self._outcomes(slot, map(slot.choose, [slot.row]))
                if scores:
                    slot.row = None  # from a call with many rows, which rounds differently
        return found

    def _parts(self) -> dict[Slot, Sequence[int]]:
        """The parts of prompts for the next call, without prompts that were reused as a whole.

        A prompt waits if it can soon reuse what that call processes for another.
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
        if first and first.mode is PrefillMode.MANY and self._reuse == "exact" and missing > 0:
            # So few tokens would be rounded differently, so some are processed again.
            begin = self._cache.lengths[first.number] - missing
            parts[first] = first.request.prompt[begin : begin + missing + len(parts[first])]
            self._cache.truncate(first.number, begin)
        return parts

    def _most(self, slot: Slot, left: int) -> int:
        """Maximum tokens of a call for prompts, by the prompt whose turn it is and its remaining tokens."""
        if slot.mode is PrefillMode.CHUNKS:
            return CHUNK - self._cache.lengths[slot.number] % CHUNK
        if slot.mode is PrefillMode.FEW:
            return self._few
        # The remainder for the next call must not be too small.
        return left - self._few - 1 if CHUNK < left <= CHUNK + self._few else CHUNK

    def _joins(self, slot: Slot, parts: Mapping[Slot, Sequence[int]]) -> bool:
        """Whether a prompt may share the call that processes these parts, and benefits from it."""
        modes = {other.mode for other, part in parts.items() if part}
        if slot.mode is PrefillMode.CHUNKS or modes != {slot.mode} or len(parts) == self._few:
            return False  # the call has as many rows of logits as can be exact
        lengths = self._cache.lengths
        ends = ((other, lengths[other.number] + len(part)) for other, part in parts.items())
        return not any(self._offers(other, end, slot) for other, end in ends)

    def _decode(self, slots: Sequence[Slot]) -> list[Outcome]:
        """Process the last token and the draft of every sequence, and choose the next tokens."""
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
            tokens = list(self._outcomes(slot, slot.verify(rows)))
            self.counts.accepted += max(len(tokens) - 1, 0)
            self._cache.truncate(slot.number, len(slot.tokens) - 1)
            found += tokens
        return found

    def _outcomes(self, slot: Slot, tokens: Iterable[Token]) -> Iterator[Outcome]:
        """The tokens of a request, and the error that ends it, if there is one."""
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
