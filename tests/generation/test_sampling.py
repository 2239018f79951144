"""Samplers as pure functions, and completions around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolctl.config import ModelConfig
from smolctl.errors import InputError, UsageError
from smolctl.generation.sampling import (
    SamplingSettings,
    choose,
    distribution,
    generator_for,
    likeliest,
    log_normalizer,
    penalize_repetition,
)
from smolctl.generation.torch_engine import TorchEngine
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize
from tests.support.tiny_models import continue_prompt

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.5,
)
PROMPT = torch.arange(7)[None]
GREEDY = SamplingSettings(temperature=0)
NOTHING_SEEN: list[int] = []


@pytest.fixture(scope="module")
def network() -> Transformer:
    return initialize(CONFIG, 0).eval()


def take(
    network: Transformer, settings: SamplingSettings, seed: int = 0, batch: int = 1, count: int = 20
) -> list[list[int]]:
    return continue_prompt(TorchEngine(network), PROMPT[0].tolist(), count, settings, batch, seed)


def draws(logits: torch.Tensor) -> torch.Tensor:
    """20,000 tokens that were chosen by the same logits, (V,)."""
    row, settings, generator = logits.numpy(), SamplingSettings(), generator_for(0)
    return torch.tensor([choose(row, settings, generator, NOTHING_SEEN) for _ in range(20_000)])


@given(seed=st.integers(0, 10**6), k=st.integers(1, 60))
def test_top_k_keeps_exactly_the_k_likeliest(seed: int, k: int) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    kept = distribution(logits.numpy(), SamplingSettings(top_k=k)) > 0
    assert kept.sum() == min(k, 50)
    assert (kept == (logits >= logits.topk(min(k, 50)).values[-1]).numpy()).all()


@given(seed=st.integers(0, 10**6), p=st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed: int, p: float) -> None:
    logits = 3 * torch.randn(50, generator=torch.Generator().manual_seed(seed))
    plain = logits.softmax(-1)
    kept = torch.from_numpy(distribution(logits.numpy(), SamplingSettings(top_p=p)) > 0)
    inside = plain[kept].sort().values
    assert inside.sum() >= min(p, 1.0) - 1e-5
    if p < 1 and len(inside) > 1:
        assert inside[1:].sum() < p + 1e-5  # without its least likely member it falls short
    assert plain[kept].min() >= plain[~kept].max() if (~kept).any() else True


@given(
    seed=st.integers(0, 10**6),
    p=st.floats(0.01, 0.999),
    scale=st.sampled_from([0.0, 0.1, 1.0, 4.0]),
    size=st.sampled_from([1, 50, 3000]),
)
def test_top_p_keeps_what_a_full_stable_sort_keeps(seed: int, p: float, scale: float, size: int) -> None:
    logits = scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    logits = logits.mul(4).round().div(4)  # many are equally likely
    kept = torch.from_numpy(distribution(logits.numpy(), SamplingSettings(top_p=p)) > 0)
    weights = (logits - logits.max()).exp().double()
    ordered, index = weights.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    expected = torch.zeros(size, dtype=torch.bool).scatter(0, index, before < p * weights.sum() - 1e-6)
    surely = torch.zeros(size, dtype=torch.bool).scatter(0, index, before < p * weights.sum() + 1e-6)
    assert (expected <= kept).all()  # the sums may round differently at the very edge
    assert (kept <= surely).all()


@given(seed=st.integers(0, 10**6), size=st.integers(1, 1000))
def test_a_dropped_token_is_never_drawn(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    settings = SamplingSettings(top_k=3, top_p=0.9)
    for number in range(4):
        logits = 5 * torch.randn(size, generator=generator).numpy()
        chosen = choose(logits, settings, generator_for(seed, number), NOTHING_SEEN)
        assert distribution(logits, settings)[chosen] > 0


def test_draws_from_a_large_vocabulary_follow_the_distribution() -> None:
    logits = 0.5 * torch.randn(2000, generator=torch.Generator().manual_seed(1))
    chosen = draws(logits)
    parts = torch.zeros(20).scatter_add(0, torch.arange(2000) // 100, logits.softmax(-1))
    shares = (chosen // 100).bincount(minlength=20) / 20_000
    torch.testing.assert_close(shares, parts, atol=0.01, rtol=0)


def test_output_that_is_not_finite_is_named() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="not finite"):
            log_normalizer(np.array([0.0, value], dtype=np.float32))


def test_min_p_drops_what_is_far_below_the_likeliest() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    kept = distribution(logits, SamplingSettings(min_p=0.4))
    np.testing.assert_allclose(kept, [0.625, 0.375, 0, 0], rtol=1e-6)


def test_temperature_sharpens_and_flattens() -> None:
    logits = np.array([2.0, 1.0], dtype=np.float32)
    sharp, plain, flat = (distribution(logits, SamplingSettings(temperature=t))[0] for t in (0.5, 1.0, 2.0))
    assert sharp > plain > flat


@given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
def test_the_likeliest_are_those_of_a_full_sort(seed: int, count: int) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(seed)).numpy()
    assert likeliest(logits, count).tolist() == np.argsort(-logits)[:count].tolist()


def test_a_seed_draws_the_same_numbers_wherever_and_whenever_it_runs() -> None:
    """Python promises the numbers, and the documentation what they are drawn from."""
    generator = generator_for(7, 0, 1)
    assert [generator.random() for _ in range(2)] == [0.39373169338069247, 0.9651495743376312]
    assert generator_for(7).random() != generator_for(-7).random()


def test_repetition_penalty_makes_seen_tokens_less_likely() -> None:
    logits = np.array([2.0, -2.0, 1.0], dtype=np.float32)
    penalized = penalize_repetition(logits, [0, 1, 0], 2.0)
    assert penalized.tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]


def test_samples_follow_the_distribution() -> None:
    shares = draws(torch.tensor([0.6, 0.3, 0.1]).log()).bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.02, rtol=0)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"top_k": -1}])
def test_values_out_of_range_are_usage_errors(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad)).replace("_", "-")):
        SamplingSettings(**bad)


def test_same_seed_same_text_and_global_generators_untouched(network: Transformer) -> None:
    before = torch.get_rng_state()
    settings = SamplingSettings(temperature=1.5)
    assert take(network, settings, seed=1) == take(network, settings, seed=1)
    assert take(network, settings, seed=1) != take(network, settings, seed=2)
    assert torch.equal(before, torch.get_rng_state())


def test_samples_of_one_prompt_decode_together_and_differ(network: Transformer) -> None:
    rows = take(network, SamplingSettings(temperature=1.5), batch=4)
    assert len({tuple(row) for row in rows}) == 4
    assert take(network, GREEDY, batch=3) == take(network, GREEDY) * 3


def test_greedy_decoding_equals_recomputing_everything(network: Transformer) -> None:
    ids = PROMPT
    with torch.inference_mode():
        for _ in range(20):
            ids = torch.cat([ids, network(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert take(network, GREEDY)[0] == ids[0, 7:].tolist()


def test_a_long_prompt_is_prefilled_in_parts_with_the_same_result(
    network: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = take(network, GREEDY)
    monkeypatch.setattr("smolctl.generation.torch_engine.PREFILL_CHUNK", 3)
    assert take(network, GREEDY) == whole


def test_generation_ends_where_the_context_ends(network: Transformer) -> None:
    assert len(take(network, GREEDY, count=1000)[0]) == 64 - 7
    with pytest.raises(InputError, match="the prompt has 64 tokens"):
        continue_prompt(TorchEngine(network), [0] * 64, 1)
