"""Intervals hold what they promise: on data whose true difference is known, and where nothing differs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from smolctl.evaluation.estimate import Estimate, Floats, by_document, observations, resampled_estimate

TRUE = 0.01  # bits per byte, of the synthetic models


def synthetic(
    chance: np.random.Generator, documents: int, seeds: int, between_seeds: float
) -> tuple[Floats, Floats, Floats]:
    """Bits of two models, (K, D) each, and bytes (D,): documents differ far more than the models do."""
    sizes = np.exp(chance.normal(8, 0.8, documents))
    hard = 1.6 + chance.normal(0, 0.3, documents)
    gap = TRUE + chance.normal(0, 0.005, documents)

    def model(rate: Floats) -> Floats:
        noise = chance.normal(0, between_seeds, (seeds, 1)) + chance.normal(0, 0.002, (seeds, documents))
        return np.asarray(sizes * (rate + noise))

    return model(hard + gap), model(hard), sizes


@pytest.mark.parametrize(
    ("documents", "seeds", "between_seeds"), [(9, 1, 0.0), (60, 1, 0.0), (20, 3, 0.01), (20, 3, 0.0)]
)
def test_the_interval_covers_the_true_difference_as_often_as_it_says(
    documents: int, seeds: int, between_seeds: float
) -> None:
    chance, trials, covered = np.random.default_rng(1), 300, 0
    for _ in range(trials):
        worse, better, sizes = synthetic(chance, documents, seeds, between_seeds)
        found = resampled_estimate(worse, sizes, better, resamples=300)
        assert found.margin is not None
        covered += abs(found.mean - TRUE) <= found.margin
    assert 0.92 <= covered / trials <= 1.0  # 95 %, less three standard deviations of 300 trials


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    worse, better, sizes = synthetic(np.random.default_rng(2), 40, 1, 0.0)
    paired = resampled_estimate(worse, sizes, better).margin
    alone = resampled_estimate(worse, sizes).margin
    assert paired is not None
    assert alone is not None
    assert 20 * paired < alone


def test_seeds_that_differ_widen_the_interval() -> None:
    worse, better, sizes = synthetic(np.random.default_rng(3), 40, 4, 0.0)
    spread = np.array([[0.98], [0.99], [1.01], [1.02]])
    calm, wild = (resampled_estimate(worse * one, sizes, better).margin for one in (1.0, spread))
    assert calm is not None
    assert wild is not None
    assert wild > 3 * calm


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_models_differ_by_exactly_nothing_and_swapped_ones_by_the_opposite(seeds: int) -> None:
    one, other, sizes = synthetic(np.random.default_rng(4), 12, seeds, 0.01)
    there, back = resampled_estimate(one, sizes, other), resampled_estimate(other, sizes, one)
    assert (there.mean, there.margin) == (-back.mean, back.margin)
    assert resampled_estimate(one[:1], sizes, one[:1]) == Estimate(0.0, 0.0, 0.0)


def test_what_is_not_finite_or_a_single_document_has_no_interval() -> None:
    assert resampled_estimate([3.0], [2.0]) == Estimate(1.5, None, None)
    assert resampled_estimate([math.nan, 1.0], [1.0, 1.0], [1.0, 1.0]).margin is None
    assert resampled_estimate([math.inf, 1.0], [1.0, 1.0], [1.0, 1.0]).margin is None


def test_many_documents_are_resampled_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    worse, better, sizes = synthetic(np.random.default_rng(5), 30, 1, 0.0)
    whole = resampled_estimate(worse, sizes, better)
    monkeypatch.setattr("smolctl.evaluation.estimate._CELLS", 30 * 7)
    parts = resampled_estimate(worse, sizes, better)
    assert parts.margin == pytest.approx(whole.margin, rel=1e-9)


def test_tokens_are_summed_by_document_and_by_parts_where_documents_are_few() -> None:
    assert by_document([7, 3, 7], [1.0, 2.0, 4.0])[0].tolist() == [2.0, 5.0]
    documents, parts = [0, 0, 1, 1], [0, 1, 1, 2]
    assert len(set(observations(documents, parts).tolist())) == 4
    assert observations([0, 1, 2, 3, 4, 5, 5], [0] * 7).tolist() == [0, 1, 2, 3, 4, 5, 5]
    one_is_most = [*range(9), *[9] * 90]
    assert len(set(observations(one_is_most, list(range(99))).tolist())) == 99
