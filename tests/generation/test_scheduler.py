"""Sequences that decode together: the tokens of each depend neither on the others nor on speculation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolctl.errors import InputError
from smolctl.generation.lookup import Lookup
from smolctl.generation.sampling import SamplingSettings, generator_for
from smolctl.generation.scheduler import CHUNK, Scheduler, Speculation
from smolctl.generation.slots import Request, Token
from smolctl.generation.torch_engine import TorchEngine
from tests.support.tiny_models import CountingEngine, plain_settings, run_requests, tiny_network, uncached

NETWORK = tiny_network()
GREEDY = plain_settings(0)
prompts = st.lists(st.integers(3, 319), min_size=1, max_size=9)


def ids(tokens: Sequence[Sequence[Token]]) -> list[list[int]]:
    return [[token.id for token in sequence] for sequence in tokens]


def continued(scheduler: Scheduler, prompt: list[int], count: int = 6) -> list[int]:
    """Token ids of a run of one request."""
    steps = scheduler.run([Request(prompt, count, generator_for(0))])
    return [token.id for step in steps for _, token in step]


@given(
    work=st.lists(st.tuples(prompts, st.integers(1, 20)), min_size=1, max_size=6),
    slots=st.integers(1, 4),
    temperature=st.sampled_from([0.0, 1.2]),
    speculation=st.sampled_from(["off", "lookup"]),
)
def test_a_prompt_gets_the_same_tokens_in_any_batch(
    work: list[tuple[list[int], int]], slots: int, temperature: float, speculation: Speculation
) -> None:
    many, counts = zip(*work, strict=True)
    scheduler = Scheduler(TorchEngine(NETWORK), slots, 40, plain_settings(temperature), speculation)
    together = ids(run_requests(scheduler, many, counts))
    assert list(map(len, together)) == list(counts)
    for index, (prompt, count) in enumerate(work):
        alone = Scheduler(TorchEngine(NETWORK), 1, 40, plain_settings(temperature))
        request = Request(prompt, count, generator_for(0, index))
        assert together[index] == [token.id for step in alone.run([request]) for _, token in step]


@given(
    seed=st.integers(0, 10_000),
    prompt=prompts,
    penalty=st.sampled_from([1.0, 1.3]),
    twins=st.booleans(),
)
def test_lookup_never_changes_greedy_tokens(
    seed: int, prompt: list[int], penalty: float, twins: bool
) -> None:
    network = tiny_network(seed, initializer_range=0.2)
    if twins:  # every token has another with exactly the same logit
        with torch.no_grad():
            network.head_weight[1::2] = network.head_weight[::2]
    tokens = {}
    speculation: Speculation
    for speculation in ("off", "lookup"):
        chosen_by = SamplingSettings(0, repetition_penalty=penalty)
        scheduler = Scheduler(TorchEngine(network), 1, 90, chosen_by, speculation)
        tokens[speculation] = ids(run_requests(scheduler, [prompt * 3], [60]))
    assert tokens["lookup"] == tokens["off"]
    if penalty == 1 and not twins:
        assert tokens["off"][0] == uncached(network, prompt * 3, 60)


def test_accepted_draft_tokens_save_calls() -> None:
    for seed in range(20):
        network = tiny_network(seed, initializer_range=0.2)
        engine = CountingEngine(TorchEngine(network))
        scheduler = Scheduler(engine, 1, 90, GREEDY, "lookup")
        run_requests(scheduler, [[5, 6, 7, 8] * 5], [60])
        counts = scheduler.counts
        assert counts.steps + 1 == len(engine.calls)
        assert counts.accepted <= counts.drafted
        if counts.accepted > 30:  # most of these models soon repeat themselves
            assert counts.steps < 40
            return
    pytest.fail("no model repeated itself")


def test_a_draft_never_reads_past_the_last_token() -> None:
    engine = CountingEngine(TorchEngine(NETWORK))
    scheduler = Scheduler(engine, 1, 30, GREEDY, "lookup")
    assert len(run_requests(scheduler, [[5, 6] * 10], [10])[0]) == 10  # the cache holds no more than 30


def test_lookup_continues_the_latest_match_and_runs_on_into_itself() -> None:
    lookup = Lookup([1, 2, 3, 9, 1, 2, 3, 4, 5, 1, 2, 3])
    lookup.rates = dict.fromkeys(lookup.rates, 1.0)
    assert lookup.draft(4) == [4, 5, 1, 2]
    repeating = Lookup([7, 8, 7, 8])
    repeating.rates = dict.fromkeys(repeating.rates, 1.0)
    assert repeating.draft(7) == [7, 8, 7, 8, 7, 8, 7]
    assert Lookup().draft(4) == []


def test_rejected_drafts_are_given_up_and_taken_up_again() -> None:
    lookup = Lookup()
    chance = torch.Generator().manual_seed(0)
    for token in torch.randint(0, 3, (200,), generator=chance).tolist():
        lookup.add(token)
    # Three random tokens: what stood behind a match is right a third of the time.
    assert len(lookup.draft(16)) <= 1
    for token in [0, 1, 2, 2, 1] * 20:
        lookup.add(token)
    assert len(lookup.draft(16)) == 16


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_alternatives_are_the_likeliest_others_in_the_models_own_distribution(temperature: float) -> None:
    prompt = [5, 6, 7]
    scheduler = Scheduler(TorchEngine(NETWORK), 1, 20, plain_settings(temperature))
    tokens = run_requests(scheduler, [prompt], [8], alternatives=4)[0]
    read = torch.tensor([prompt + [token.id for token in tokens]])
    with torch.inference_mode():
        probabilities = NETWORK(read)[0, len(prompt) - 1 : -1].softmax(-1)
    for token, expected in zip(tokens, probabilities, strict=True):
        assert math.exp(token.logprob) == pytest.approx(float(expected[token.id]), rel=1e-4)
        others = [int(id) for id in expected.argsort(descending=True) if id != token.id][:4]
        assert [id for id, _ in token.alternatives] == others
        assert [p for _, p in token.alternatives] == pytest.approx(expected[others].tolist(), rel=1e-4)


def test_a_shared_prompt_is_read_once() -> None:
    engine = CountingEngine(TorchEngine(NETWORK))
    run_requests(Scheduler(engine, 3, 20, GREEDY), [[5, 6, 7, 8]] * 3, [5] * 3)
    assert engine.tokens_read == 4 + 3 * 4  # the last token of each is chosen and not read


def test_what_prompts_begin_with_alike_is_read_once() -> None:
    network = tiny_network(context=3 * CHUNK)
    engine = CountingEngine(TorchEngine(network))
    many = [[5] * (2 * CHUNK + 5) + [6 + number] * number for number in range(1, 4)]
    scheduler = Scheduler(engine, 3, 3 * CHUNK, GREEDY)
    found = ids(run_requests(scheduler, many, [4] * 3))
    assert scheduler.counts.prefilled == 2 * CHUNK + 3 * 5 + 1 + 2 + 3  # whole chunks are shared
    assert engine.tokens_read == scheduler.counts.prefilled + 3 * 3
    assert found == [uncached(network, prompt, 4) for prompt in many]


def test_a_sequence_that_ends_makes_room_for_the_next() -> None:
    engine = CountingEngine(TorchEngine(NETWORK), exact_tokens=2)
    run_requests(Scheduler(engine, 2, 30, GREEDY, "off"), [[5], [6], [7]], [20, 5, 5])
    assert len(engine.calls) <= 20 + 2  # the others run beside the first, but for their prompts


def test_what_the_cache_holds_is_not_read_again() -> None:
    engine = CountingEngine(TorchEngine(NETWORK))
    scheduler = Scheduler(engine, 1, 60, GREEDY, reuse="all")
    prompt = [5, 6, 7, 8, 9]
    first = continued(scheduler, prompt)
    longer = [*prompt, *first, 11, 12]
    read = engine.tokens_read
    second = continued(scheduler, longer)
    assert engine.tokens_read - read == 3 + 5  # the last answer's last token, the two new ones, five chosen
    assert second == uncached(NETWORK, longer, 6)
    assert scheduler.counts.reused == len(longer) - 3
    again = continued(scheduler, prompt)
    assert again == first
    assert scheduler.counts.reused == len(prompt) - 1


def test_an_interrupted_step_leaves_a_cache_that_can_be_used() -> None:
    class Interrupted(CountingEngine):
        def forward(self, tokens, cache, every=False):  # type: ignore[no-untyped-def]
            logits = super().forward(tokens, cache, every)
            if len(self.calls) == 9:
                raise KeyboardInterrupt  # behind the work, before anybody has seen it
            return logits

    scheduler = Scheduler(Interrupted(TorchEngine(NETWORK)), 1, 90, GREEDY, "lookup", "all")
    prompt = [5, 6, 7] * 4
    got: list[int] = []

    def decode() -> None:
        for step in scheduler.run([Request(prompt, 60, generator_for(0))]):
            got.extend(token.id for _, token in step)

    with pytest.raises(KeyboardInterrupt):
        decode()
    assert got == uncached(NETWORK, prompt, len(got))
    longer = [*prompt, *got, 11]
    after = continued(scheduler, longer)
    assert after == uncached(NETWORK, longer, 6)


def test_prompts_that_do_not_fit_are_refused_before_any_work() -> None:
    engine = CountingEngine(TorchEngine(NETWORK))
    scheduler = Scheduler(engine, 1, 20, GREEDY)
    for bad, named in (([], "empty"), ([1] * 20, "20 tokens")):
        with pytest.raises(InputError, match=named):
            run_requests(scheduler, [[5], bad], [3, 3])
    assert engine.calls == []
