"""Work that is abandoned ends soon, and never disturbs what comes after it."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from smolctl.config import ModelConfig
from smolctl.generation.engine import Cancellation, CancelledError, Engine, EngineBusyError
from smolctl.generation.native_engine import CHUNK, NativeEngine
from smolctl.generation.sampling import generator_for
from smolctl.generation.scheduler import Scheduler
from smolctl.generation.slots import Request
from smolctl.generation.torch_engine import TorchEngine
from smolctl.model.weights import initialize
from smolctl.native.library import BUILDS
from tests.support.native import Watched, watched_engine
from tests.support.tiny_models import continue_prompt, plain_settings

CONFIG = ModelConfig(
    vocab_size=131,
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=1600,
    initializer_range=0.15,
    position_embedding="rope",
    residual_scale=1.0,
)
LONG = torch.randint(0, 131, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
SHORT = [LONG[at : at + 5 + at % 7] for at in range(0, 200, 10)]
COUNT = 6  # tokens that follow a short prompt
HUNG_S = 600  # a child that takes longer will never end
# The portable build in every run of the tests, the others in the full one.
EVERY_BUILD = [BUILDS[0], *(pytest.param(build, marks=pytest.mark.slow) for build in BUILDS[1:])]


def native(build: str = "baseline") -> tuple[NativeEngine, Watched]:
    return watched_engine(initialize(CONFIG, 3), build)


def answer(engine: Engine, prompt: list[int]) -> list[int]:
    return continue_prompt(engine, prompt, COUNT)[0]


def start(engine: Engine, cancellation: Cancellation) -> Iterator[object]:
    """A long prefill that has not begun."""
    scheduler = Scheduler(engine, 1, len(LONG) + 1, plain_settings(0))
    return scheduler.run([Request(LONG, 1, generator_for(0))], cancellation=cancellation)


def survives(work: Callable[[], None]) -> None:
    """Do it in a forked process: if it dies, the test fails and the others go on."""
    child = os.fork()
    if child == 0:
        signal.alarm(HUNG_S)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("build", EVERY_BUILD)
def test_threads_that_share_an_engine_get_the_answers_of_one_thread(build: str) -> None:
    engine, _ = native(build)
    prompts = [LONG[:500], *SHORT] * 2
    expected = [answer(engine, prompt) for prompt in prompts]

    def work() -> None:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda prompt: answer(engine, prompt), prompts)) == expected

    survives(work)


@pytest.mark.parametrize("build", EVERY_BUILD)
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_hundred_cancelled_prefills_each_followed_at_once_by_a_prompt(build: str, threads: int) -> None:
    engine, watched = native(build)
    expected = [answer(engine, prompt) for prompt in SHORT]

    def cancel_and_go_on(seed: int) -> None:
        chance, cancelled = random.Random(seed), 0
        for number in range(100 // threads):
            cancellation = Cancellation()
            with ThreadPoolExecutor(1) as pool:
                abandoned = watched.begin(pool, next, start(engine, cancellation))
                time.sleep(chance.random() * 0.01)  # in another layer, or another chunk, every time
                cancellation.set()
                index = number % len(SHORT)
                assert answer(engine, SHORT[index]) == expected[index]
                error = abandoned.exception()  # None: the prefill ended first, on a busy machine
                assert error is None or isinstance(error, CancelledError)
                cancelled += error is not None
        assert cancelled > 0

    def work() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(cancel_and_go_on, range(threads)))

    survives(work)


def test_a_cancelled_prefill_leaves_in_its_first_chunk() -> None:
    engine, watched = native()
    cancellation = Cancellation()
    watched.on_entry = cancellation.set
    with pytest.raises(CancelledError):
        next(start(engine, cancellation))
    assert watched.entries == 1


@pytest.mark.parametrize("make", [lambda: native()[0], lambda: TorchEngine(initialize(CONFIG, 3).eval())])
def test_a_cancelled_call_leaves_the_cache_as_it_was(make: Callable[[], Engine]) -> None:
    engine = make()
    cache = engine.allocate(1, 1600)
    engine.forward([LONG[:600]], cache)
    expected = engine.forward([[7]], cache)
    cache.truncate(0, 600)
    cache.cancellation.set()
    with pytest.raises(CancelledError):
        engine.forward([LONG[600:]], cache)
    assert cache.lengths == [600]
    cache.cancellation = Cancellation()
    assert np.array_equal(engine.forward([[7]], cache), expected)


def test_the_compiled_code_refuses_a_second_call_and_to_be_freed_meanwhile() -> None:
    engine, watched = native()
    prompts = [LONG[:CHUNK], [5]]  # one call each
    expected = [engine.forward([prompt], engine.allocate(1, CHUNK)) for prompt in prompts]
    engine._turn = nullcontext()  # type: ignore[assignment]  # the lock that callers wait for
    refused: set[str] = set()
    while len(refused) < 2:
        caches = [engine.allocate(1, CHUNK) for _ in prompts]
        with ThreadPoolExecutor(2) as pool:
            first = watched.begin(pool, engine.forward, [prompts[0]], caches[0])
            second = pool.submit(engine.forward, [prompts[1]], caches[1])
            if isinstance(second.exception(), EngineBusyError):
                refused.add("call")  # so the first one is inside, or has been
                try:
                    engine._close()
                except EngineBusyError:
                    refused.add("free")
        results = [called.exception() or called.result() for called in (first, second)]
        for result, logits in zip(results, expected, strict=True):
            assert isinstance(result, EngineBusyError) or np.array_equal(result, logits)  # type: ignore[arg-type]
        assert sum(isinstance(result, EngineBusyError) for result in results) < 2


def test_a_longer_context_is_allocated_while_another_thread_decodes() -> None:
    engine, watched = native()
    expected = answer(native()[0], LONG)
    with ThreadPoolExecutor(1) as pool:
        whole = watched.begin(pool, answer, engine, LONG)
        engine.allocate(1, CONFIG.max_position_embeddings)  # makes the table of angles longer
        assert whole.result() == expected


def test_a_run_cancels_the_one_before_it_in_the_same_cache() -> None:
    engine, watched = native()
    expected = answer(engine, SHORT[0])
    scheduler = Scheduler(engine, 1, CONFIG.max_position_embeddings, plain_settings(0))
    for _ in range(20):
        with ThreadPoolExecutor(1) as pool:
            run = scheduler.run([Request(LONG, 9, generator_for(0))])
            abandoned = watched.begin(pool, next, run)
            steps = scheduler.run([Request(SHORT[0], COUNT, generator_for(0))])
            assert [token.id for step in steps for _, token in step] == expected
            assert abandoned.exception() is None or isinstance(abandoned.exception(), CancelledError)


def test_a_suspended_run_that_is_resumed_after_another_began_is_cancelled() -> None:
    engine, _ = native()
    scheduler = Scheduler(engine, 1, 100, plain_settings(0))
    first = scheduler.run([request := Request(SHORT[0], 50, generator_for(0))])
    next(first)
    second = scheduler.run([Request(SHORT[1], COUNT, generator_for(0))])
    tokens = [token.id for _, token in next(second)]
    scheduler.end(request)  # of the first run: ends nothing in the second
    with pytest.raises(CancelledError):
        next(first)
    tokens += [token.id for step in second for _, token in step]
    assert tokens == answer(engine, SHORT[1])


def test_a_dropped_generator_leaves_the_engine_free() -> None:
    engine, _ = native()
    expected = answer(engine, SHORT[3])
    for taken in range(5):
        steps = start(engine, Cancellation())
        list(itertools.islice(steps, taken))
        del steps
        assert answer(engine, SHORT[3]) == expected


def test_a_process_forked_while_a_call_is_under_way_can_use_the_engine() -> None:
    engine, watched = native()
    expected = answer(engine, SHORT[0])

    def work() -> None:
        assert answer(engine, SHORT[0]) == expected

    for _ in range(5):
        cancellation = Cancellation()
        with ThreadPoolExecutor(1) as pool:
            watched.begin(pool, next, start(engine, cancellation))
            survives(work)
            cancellation.set()
    assert answer(engine, SHORT[0]) == expected
