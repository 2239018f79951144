"""What may be said of times: medians, ratios of neighbours, and when a difference is more than noise."""

from __future__ import annotations

import itertools
import random
from math import comb

import pytest

from smolctl.timing import Spread, in_turns, median_interval, ratio_of


def test_everybody_works_once_a_round_and_the_order_turns_around() -> None:
    calls: list[str] = []
    ticks = itertools.count()

    def work(name: str) -> int:
        calls.append(name)
        return next(ticks)

    heard: list[int] = []
    results = in_turns([lambda: work("a"), lambda: work("b")], 3, warmups=2, after_round=heard.append)
    rounds = [calls[at : at + 2] for at in range(0, 10, 2)]
    assert all(sorted(one) == ["a", "b"] for one in rounds)
    assert all(one != other for one, other in itertools.pairwise(rounds))
    assert heard == [0, 1, 2, 3]
    assert [len(result) for result in results] == [3, 3]
    assert min(results[0] + results[1]) == 4  # what the two warm-ups measured is not among them


def test_spread_is_median_and_range() -> None:
    assert Spread.of([5.0, 1.0, 2.0]) == Spread(2.0, 1.0, 5.0)
    assert Spread.of([1.0, 2.0]).median == 1.5


def test_median_interval_needs_six_values_and_then_widens_no_further_than_it_must() -> None:
    values = [float(value) for value in range(1, 21)]
    assert median_interval(values[:5]) is None
    assert median_interval(values[:6]) == (1, 6)
    assert median_interval(values[:8]) == (1, 8)
    assert median_interval(values[:9]) == (2, 8)
    assert median_interval(values) == (6, 15)  # the textbook's order statistics for n = 20
    assert median_interval([3.0, 9.0, 1.0, 7.0, 5.0, 8.0]) == (1, 9)


@pytest.mark.parametrize("count", [6, 7, 9, 12, 25])
def test_median_interval_holds_the_median_as_often_as_it_says(count: int) -> None:
    """Exactly: the k-th smallest lies above the median with the probability of fewer than k heads."""
    values = [float(value) for value in range(count)]
    interval = median_interval(values)
    assert interval is not None
    rank = int(interval[0])  # values below the interval
    outside = 2 * sum(comb(count, heads) for heads in range(rank + 1)) / 2**count
    narrower = 2 * sum(comb(count, heads) for heads in range(rank + 2)) / 2**count
    assert outside <= 0.05 < narrower


def test_a_drift_that_both_share_cancels_in_the_ratio() -> None:
    drift = [1.0, 1.5, 3.0, 2.0, 1.2, 5.0, 1.1]
    ratio = ratio_of([2.0 * slow for slow in drift], drift)
    assert ratio.spread == Spread(2.0, 2.0, 2.0)
    assert ratio.beyond_noise is True


def test_a_difference_is_noise_when_rounds_disagree() -> None:
    mixed = ratio_of([1.1, 0.9, 1.2, 0.95, 1.05, 1.1, 0.97], [1.0] * 7)
    assert mixed.beyond_noise is False
    assert ratio_of([1.01] * 7, [1.0] * 7).beyond_noise is True  # small, and real
    assert ratio_of([9.0] * 5, [1.0] * 5).beyond_noise is None  # large, and too few rounds


def test_equal_engines_are_seldom_called_different() -> None:
    """The rule's own promise, at 95 %: with skewed noise, as times on shared machines have it."""
    chance = random.Random(0)
    alarms = sum(
        ratio_of(
            [chance.lognormvariate(0, 0.3) for _ in range(7)],
            [chance.lognormvariate(0, 0.3) for _ in range(7)],
        ).beyond_noise
        is True
        for _ in range(2000)
    )
    assert 0 < alarms < 0.04 * 2000  # 2 / 2^7 = 1.6 % of them, for seven rounds
