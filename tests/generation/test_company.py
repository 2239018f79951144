"""Requests that come and go while others run: none changes another's answer, and none waits for long."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolctl.errors import InputError, SmolError
from smolctl.generation.engine import Engine, Logits
from smolctl.generation.sampling import generator_for
from smolctl.generation.scheduler import CHUNK, Reuse, Scheduler
from smolctl.generation.slots import Request, Token
from smolctl.generation.torch_engine import TorchEngine
from smolctl.model.weights import initialize
from tests.support.native import watched_engine
from tests.support.tiny_models import CountingEngine, plain_settings, tiny_network

CONTEXT = 5 * CHUNK
NETWORK = tiny_network(context=CONTEXT, position_embedding="rope", residual_scale=1.0)
GREEDY = plain_settings(0)
# What prompts may begin with alike: nothing, a part of a chunk, a chunk and a part, two chunks.
BEGINNINGS: tuple[list[int], ...] = ([], [7] * 20, [5, 9] * (CHUNK - 10), [8] * (2 * CHUNK))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return watched_engine(initialize(NETWORK.config, 1), "baseline")[0]


@pytest.fixture(scope="module")
def alone(engine: Engine) -> Callable[[int, float], list[Token]]:
    """`alone(number, temperature)`: the answer to a request that has a scheduler for itself."""

    @cache
    def answer(number: int, temperature: float) -> list[Token]:
        steps = Scheduler(engine, 1, CONTEXT, GREEDY).run([request(number, temperature)])
        return [token for step in steps for _, token in step]

    return answer


def request(number: int, temperature: float = 1.0, count: int = 6) -> Request:
    """A prompt of its own that may begin as others do."""
    chance = Random(number)
    own = [chance.randrange(3, 319) for _ in range(chance.choice([1, 3, 9, CHUNK, CHUNK + 1]))]
    sampling = plain_settings(temperature)
    return Request([*chance.choice(BEGINNINGS), *own], count, generator_for(0, number), sampling)


def collect(scheduler: Scheduler, found: dict[Request, list[Token]]) -> None:
    for one, token in scheduler.step():
        assert isinstance(token, Token)
        found.setdefault(one, []).append(token)


@given(
    numbers=st.lists(st.integers(0, 12), min_size=2, max_size=6),
    slots=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 1.0]),
    chance=st.randoms(use_true_random=False),
)
def test_an_answer_is_the_same_to_the_last_bit_alone_and_in_company(
    engine: Engine,
    alone: Callable[[int, float], list[Token]],
    numbers: list[int],
    slots: int,
    temperature: float,
    chance: Random,
) -> None:
    scheduler = Scheduler(engine, slots, CONTEXT, GREEDY)
    requests = [request(number, temperature) for number in numbers]
    cancelled = [one for one in requests if chance.random() < 0.2]  # a set would have an order of its own
    found: dict[Request, list[Token]] = {one: [] for one in requests}
    coming = list(requests)
    while coming or scheduler.active or scheduler.waiting:
        if coming and chance.random() < 0.4:
            scheduler.submit(coming.pop(0))
        collect(scheduler, found)
        for one in cancelled:
            if chance.random() < 0.1:
                scheduler.end(one)
    for number, one in zip(numbers, requests, strict=True):
        expected = alone(number, temperature)
        # A token's log-probability is a number of the model's: it shows a single bit that differs.
        assert found[one] == (expected[: len(found[one])] if one in cancelled else expected)


@pytest.mark.parametrize("is_uniform", [False, True])
def test_a_long_prompt_delays_nobody_by_more_than_a_chunk_a_round(is_uniform: bool) -> None:
    engine = CountingEngine(TorchEngine(NETWORK), 4, is_uniform)
    scheduler = Scheduler(engine, 4, CONTEXT, GREEDY, "off")
    found: dict[Request, list[Token]] = {}
    prompts = ([5] * 3, [6] * 300, [7] * 3)
    running, long, short = (Request(prompt, 50, Random()) for prompt in prompts)
    scheduler.submit(running)
    collect(scheduler, found)
    scheduler.submit(long)
    collect(scheduler, found)
    scheduler.submit(short)
    calls = len(engine.calls)
    while short not in found:
        before = len(found[running])
        collect(scheduler, found)
        collect(scheduler, found)
        assert len(found[running]) > before  # a token in every round
    assert len(engine.calls) - calls <= 4
    assert long not in found
    assert max(sum(map(len, call)) for call in engine.calls) <= CHUNK


@pytest.mark.parametrize("exact_tokens", [4, CHUNK])
def test_prompts_that_come_together_are_read_together_and_their_common_beginning_once(
    exact_tokens: int,
) -> None:
    engine = CountingEngine(TorchEngine(NETWORK), exact_tokens, is_uniform=True)
    scheduler = Scheduler(engine, 6, CONTEXT, GREEDY, "off")
    requests = [Request([5] * 100 + [6 + number] * 20, 2, Random()) for number in range(6)]
    for one in requests:
        scheduler.submit(one)
    found: dict[Request, list[Token]] = {}
    while len(found) < len(requests):
        collect(scheduler, found)
    prompts = [call for call in engine.calls if sum(map(len, call)) > len(requests)]
    assert sum(len(ids) for call in prompts for ids in call) == 100 + 6 * 20 == scheduler.counts.prefilled
    assert len(prompts) == 4  # two of the first prompt by itself, and 100 other tokens


def test_what_is_left_of_a_prompt_is_read_in_no_smaller_call_than_its_bits_ask_for() -> None:
    engine = CountingEngine(TorchEngine(NETWORK), exact_tokens=16, is_uniform=True)
    scheduler = Scheduler(engine, 2, CONTEXT, GREEDY, "off")
    found: dict[Request, list[Token]] = {}
    for prompt in ([5] * 40, [5] * 40 + [6], [7] * 3, [7] * 3 + [8], [9] * (CHUNK + 1)):
        scheduler.submit(Request(prompt, 1, Random()))
        while scheduler.active or scheduler.waiting:
            collect(scheduler, found)
    assert [sum(map(len, call)) for call in engine.calls] == [40, 17, 3, 1, CHUNK - 16, 17]


@pytest.mark.parametrize("when", ["waiting", "reading", "decoding"])
def test_a_request_that_is_ended_gets_no_further_call(when: str) -> None:
    engine = CountingEngine(TorchEngine(NETWORK))
    scheduler = Scheduler(engine, 1, CONTEXT, GREEDY)
    first, second = Request([5] * 200, 9, Random()), Request([6], 9, Random())
    scheduler.submit(first)
    scheduler.submit(second)
    for _ in range({"waiting": 0, "reading": 2, "decoding": 6}[when]):
        scheduler.step()
    calls = len(engine.calls)
    scheduler.end(first)
    found: dict[Request, list[Token]] = {}
    while scheduler.active or scheduler.waiting:
        collect(scheduler, found)
    assert set(found) == {second}
    assert len(found[second]) == 9 == len(engine.calls) - calls


@pytest.mark.parametrize("reuse", ["exact", "all"])
def test_the_same_prompt_twice_is_read_once_and_gets_the_same_answer(reuse: Reuse) -> None:
    engine = CountingEngine(TorchEngine(NETWORK))
    scheduler = Scheduler(engine, 2, CONTEXT, GREEDY, reuse=reuse)
    answers = []
    for _ in range(3):
        steps = scheduler.run([Request([5, 6] * 50, 5, Random())])
        answers.append([token for step in steps for _, token in step])
        assert scheduler.counts.prefilled == (0 if answers[1:] else 100)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("length", [1, CHUNK, CHUNK + 1])
def test_the_tokens_of_a_prompt_are_scored(length: int) -> None:
    prompt = [3 + (7 * at) % 300 for at in range(length)]
    scheduler = Scheduler(TorchEngine(NETWORK), 2, CONTEXT, GREEDY)
    plain, scoring = (Request(prompt, 3, Random(), alternatives=2, score=score) for score in (False, True))
    found: dict[Request, list[Token]] = {}
    for one in (plain, scoring):  # what the first has read is not reused: its logits are wanted
        scheduler.submit(one)
        while scheduler.active or scheduler.waiting:
            collect(scheduler, found)
    scored = [token for token in found[scoring] if token.of_prompt]
    assert [token.id for token in scored] == prompt[1:]
    assert [token.id for token in found[scoring][len(scored) :]] == [token.id for token in found[plain]]
    for at, token in list(enumerate(scored, 1))[-9:]:
        (behind,) = (t for step in scheduler.run([Request(prompt[:at], 1, Random())]) for _, t in step)
        expected = {behind.id: behind.logprob}
        if token.id in expected:
            assert token.logprob == pytest.approx(expected[token.id], abs=1e-4)
        else:
            assert behind.id in dict(token.alternatives)


class Broken:
    """A constraint that fails at its third token."""

    def __init__(self) -> None:
        self.taken = 0

    def mask(self, row: Logits) -> Logits:
        if self.taken == 2:
            raise InputError("nothing may come next")
        return row

    def accept(self, token: int) -> None:
        self.taken += 1


def test_a_request_that_fails_ends_alone() -> None:
    scheduler = Scheduler(TorchEngine(NETWORK), 2, CONTEXT, GREEDY)
    whole, failing = (Request([5, 6], 6, Random(), constraint=broken) for broken in (None, Broken()))
    for one in (whole, failing):
        scheduler.submit(one)
    found: dict[Request, list[Token | SmolError]] = {whole: [], failing: []}
    while scheduler.active or scheduler.waiting:
        for one, outcome in scheduler.step():
            found[one].append(outcome)
    assert [type(outcome) for outcome in found[failing]] == [Token, Token, InputError]
    assert len(found[whole]) == 6
    assert all(isinstance(outcome, Token) for outcome in found[whole])
