"""What visitors of a Gradio Space share: one engine, its memory, and the ways in which an answer ends."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smolctl.data.tokenizer.prompt import Prompt
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.generation.conversation import Conversation
from smolctl.generation.load import LoadedModel, load_model
from smolctl.publish.space_endpoints import REFUSED, STOPPED, SpaceEndpoints, Visit
from tests.support.native import watched_engine
from tests.support.tiny_models import tiny_model, tiny_network, tiny_tokenizer


@pytest.fixture
def endpoints_of() -> Iterator[Callable[..., SpaceEndpoints]]:
    """Makes speakers, and ends their threads when the test is over."""
    made: list[SpaceEndpoints] = []

    def make(*arguments: Any, **options: Any) -> SpaceEndpoints:
        made.append(SpaceEndpoints(*arguments, **options))
        return made[-1]

    yield make
    for endpoints in made:
        endpoints.service.close()


def test_a_chat_forgets_its_oldest_turns_rather_than_fail(
    chat_space: Path, endpoints_of: Callable[..., SpaceEndpoints]
) -> None:
    endpoints = endpoints_of(load_model(str(chat_space / "model")))
    history = [
        {"role": role, "content": [{"type": "text", "text": "the cat sat on a mat " * 3}]}
        for _ in range(20)
        for role in ("user", "assistant")
    ]

    async def ask() -> str:
        return [text async for text in endpoints.chat("the cat", history, 8, 0.7, 0.95, 0, 1.0, 1)][-1]

    answer = asyncio.run(ask())
    assert answer
    assert answer == asyncio.run(ask())  # the seed's text


@pytest.mark.parametrize("calls", [0, 9], ids=["while the prompt is read", "while text comes"])
def test_a_visitor_who_leaves_stops_the_work_and_the_next_is_answered_at_once(
    calls: int, endpoints_of: Callable[..., SpaceEndpoints]
) -> None:
    engine, watched = watched_engine(tiny_network(context=1600))
    model, controls = LoadedModel("tiny", engine, tiny_tokenizer(), 0.0), (1000, 0.0, 1.0, 0, 1.0, 1)
    endpoints = endpoints_of(model)

    async def next_visitor() -> str:
        return [text async for text in endpoints.continue_text("the dog", 8, *controls[1:])][-1]

    expected = answers_to(endpoints_of(model), "the dog")[-1]
    needed, watched.entries = watched.entries, 0
    permits = threading.Semaphore(calls)  # of calls of the engine, before it waits for the visitor to leave
    watched.on_entry = permits.acquire

    async def leave() -> None:
        stream = endpoints.continue_text("the cat", *controls)
        waiting = asyncio.create_task(anext(stream))
        while watched.entries <= calls:
            await asyncio.sleep(0.001)
        if calls:
            assert (await waiting).startswith("the cat")
            await stream.aclose()
        else:
            waiting.cancel()  # as Gradio does
            with pytest.raises(asyncio.CancelledError):
                await waiting
        permits.release(1000)
        assert await next_visitor() == expected

    asyncio.run(leave())
    assert watched.entries == calls + 1 + needed


def answers_to(
    endpoints: SpaceEndpoints,
    prompt: str = "the cat",
    tokens: int = 8,
    controls: Sequence[float] | None = None,
) -> list[str]:
    """All versions of a continuation, a greedy one where nothing else is said."""

    async def ask() -> list[str]:
        greedy = (tokens, 0.0, 1.0, 0, 1.0, 1)
        return [text async for text in endpoints.continue_text(prompt, *(controls or greedy))]

    return asyncio.run(ask())


@pytest.mark.parametrize("why", ["the page was closed", "time is up"])
def test_an_answer_nobody_waits_for_ends_while_its_prompt_is_read(
    why: str, monkeypatch: pytest.MonkeyPatch, endpoints_of: Callable[..., SpaceEndpoints]
) -> None:
    monkeypatch.setattr("smolctl.publish.space_endpoints.CHECK_EVERY_S", 0.005)
    engine, watched = watched_engine(tiny_network(context=1600))
    model = LoadedModel("tiny", engine, tiny_tokenizer(), 0.0)
    expected, needed = answers_to(endpoints_of(model))[-1], watched.entries
    waits = why == "time is up"
    reading = threading.Event()

    def read() -> None:
        reading.set()
        time.sleep(0.03)

    visit = Visit(lambda: reading.is_set() and not waits)
    endpoints = endpoints_of(model, 0.02 if waits else 60.0, lambda: visit)
    watched.entries, watched.on_entry = 0, read
    assert answers_to(endpoints, "the cat sat on the mat. " * 60, 500) == [
        "the cat sat on the mat. " * 60 + STOPPED
    ]
    assert watched.entries <= 1  # of the several that the prompt needs
    watched.entries = 0
    assert answers_to(endpoints_of(model))[-1] == expected
    assert watched.entries == needed


def test_visitors_are_answered_together_and_each_stops_alone(
    endpoints_of: Callable[..., SpaceEndpoints],
) -> None:
    engine, watched = watched_engine(tiny_network(context=1600))
    endpoints = endpoints_of(LoadedModel("tiny", engine, tiny_tokenizer(), 0.0))
    texts, sampled = ("the cat", "the dog", "a mat", "the cat sat"), (24, 1.0, 1.0, 0, 1.0, 7)
    expected = [answers_to(endpoints, text, controls=sampled)[-1] for text in texts]
    gate = threading.Event()
    watched.entries, watched.on_entry = 0, gate.wait  # all have asked before anybody is answered

    async def visit(text: str, leaves: bool) -> str:
        versions = []
        async with aclosing(endpoints.continue_text(text, *(1500 if leaves else 24, *sampled[1:]))) as answer:
            async for version in answer:
                versions.append(version)
                if leaves:
                    break
        return versions[-1]

    async def visits() -> list[str]:
        asked = [asyncio.ensure_future(visit(text, leaves=False)) for text in texts]
        leaving = [asyncio.ensure_future(visit(text, leaves=True)) for text in texts]
        while endpoints.service.scheduler.active + endpoints.service.scheduler.waiting < 1:
            await asyncio.sleep(0.001)
        gate.set()
        await asyncio.gather(*leaving)
        return await asyncio.gather(*asked)

    assert asyncio.run(visits()) == expected
    assert watched.entries < 1000  # one after the other, the first that leaves would have held up the rest
    while endpoints.service.scheduler.active:
        time.sleep(0.001)


@pytest.mark.parametrize(("room", "slots"), [(1 << 40, 8), (1 << 20, 1)])
def test_conversations_in_memory_are_as_many_as_fit(
    room: int, slots: int, monkeypatch: pytest.MonkeyPatch, endpoints_of: Callable[..., SpaceEndpoints]
) -> None:
    monkeypatch.setattr("smolctl.publish.space_endpoints.CACHE_BYTES", room)
    endpoints = endpoints_of(tiny_model(context=1 << 12))
    assert endpoints.service.slots == slots
    assert slots == 1 or endpoints.service.cache_bytes <= room


@pytest.mark.proof
@pytest.mark.real_weights
def test_a_hundred_closed_answers_leave_the_next_one_as_it_was(
    gguf_file: Path, endpoints_of: Callable[..., SpaceEndpoints]
) -> None:
    endpoints, chance = endpoints_of(load_model(str(gguf_file))), random.Random(0)
    long, likeliest = "Tell me about the cat that sat on the mat. " * 150, (0.0, 1.0, 0, 1.0, 1)

    async def short() -> str:
        return [text async for text in endpoints.continue_text("The capital of France is", 8, *likeliest)][-1]

    async def close_and_go_on() -> int:
        """How many answers were closed before their first text."""
        expected, early = await short(), 0
        for _ in range(100):
            answer = endpoints.continue_text(long, 100, *likeliest)
            first = asyncio.ensure_future(anext(answer))
            await asyncio.wait([first], timeout=chance.random())
            early += first.cancel()
            with suppress(asyncio.CancelledError):
                await first
            await answer.aclose()
            assert await short() == expected
        return early

    assert asyncio.run(close_and_go_on()) > 50


def test_what_the_page_says_below_an_answer_is_not_read_as_the_models(
    endpoints_of: Callable[..., SpaceEndpoints],
) -> None:
    endpoints = endpoints_of(tiny_model(context=200))

    async def ask(answer: str) -> str:
        history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        return [text async for text in endpoints.chat("the cat", history, 8, 0.0, 1.0, 0, 1.0, 1)][-1]

    for note in (STOPPED, f"{REFUSED}no room"):
        assert asyncio.run(ask(f"the dog\n\n{note}")) == asyncio.run(ask("the dog"))


def test_the_page_says_why_there_is_no_answer(endpoints_of: Callable[..., SpaceEndpoints]) -> None:
    """An error would lock its box for good; a program gets one."""
    endpoints = endpoints_of(tiny_model(), visit=lambda: Visit(by_program=False))

    async def ask() -> list[str]:
        return [text async for text in endpoints.chat("the cat " * 1000, [], 8, 0.0, 1.0, 0, 1.0, 1)]

    assert asyncio.run(ask()) == [
        f"{REFUSED}the prompt has 8,000 characters, but the model's context of 96 tokens holds 1,536 at most"
        ". Shorten the prompt."
    ]


def test_a_long_conversation_is_tokenized_a_few_times_only() -> None:
    class Counting(Tokenizer):
        calls = 0

        def chat_prompt(self, *arguments: Any, **options: Any) -> Prompt:
            Counting.calls += 1
            return super().chat_prompt(*arguments, **options)

    trained = tiny_tokenizer()
    tokenizer = Counting(trained.backend, trained.chat_template, bos_token_id=0, eos_token_id=2)
    model = replace(tiny_model(context=200), tokenizer=tokenizer)
    turns = [{"role": role, "content": "the cat"} for _ in range(500) for role in ("user", "assistant")]
    conversation = Conversation(chat=True, turns=turns)
    forgotten = conversation.make_room(model, "the dog", 200, 20)
    assert Counting.calls < 15
    assert 0 < len(conversation.turns) == 1000 - 2 * forgotten
    longer = Conversation(chat=True, turns=turns[2 * forgotten - 2 :])
    assert len(conversation.prompt(model, "the dog").ids) + 50 <= 200
    assert len(longer.prompt(model, "the dog").ids) + 50 > 200  # no turn was forgotten for nothing
