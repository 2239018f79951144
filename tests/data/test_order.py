"""The order of the data: a permutation in every pass, computed and never stored."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from smolctl.data.order import (
    MIXTURE,
    pass_start,
    permute,
    shares_of,
    sources_of_samples,
    starts_of_samples,
    window_count,
    windows_of_samples,
)

BILLION = 10**9


def windows_of_step(step: int, batch_size: int, windows: int, seed: int) -> NDArray[np.int64]:
    samples = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    return windows_of_samples(samples, windows, seed)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), number=st.integers(0, 10**6))
def test_every_pass_is_a_permutation(size: int, seed: int, number: int) -> None:
    images = permute(np.arange(size), size, seed, number)
    assert sorted(images.tolist()) == list(range(size))


@given(windows=st.integers(1, 300), batch=st.integers(1, 40), seed=st.integers(0, 1000))
def test_every_window_is_seen_once_a_pass_whatever_the_batch_size(
    windows: int, batch: int, seed: int
) -> None:
    steps = -(-2 * windows // batch)
    seen = np.concatenate([windows_of_step(step, batch, windows, seed) for step in range(steps)])
    for start in (0, windows):
        assert sorted(seen[start : start + windows].tolist()) == list(range(windows))


def test_order_is_a_function_of_seed_and_step_alone() -> None:
    forward = [windows_of_step(step, 16, 1000, seed=3).tolist() for step in range(100)]
    backward = [windows_of_step(step, 16, 1000, seed=3).tolist() for step in reversed(range(100))]
    assert forward == backward[::-1]
    assert forward != [windows_of_step(step, 16, 1000, seed=4).tolist() for step in range(100)]


def test_batches_of_one_order_do_not_depend_on_the_batch_size() -> None:
    small = np.concatenate([windows_of_step(step, 4, 777, seed=1) for step in range(8)])
    large = np.concatenate([windows_of_step(step, 16, 777, seed=1) for step in range(2)])
    assert small.tolist() == large.tolist()


def test_a_billion_windows_cost_no_memory() -> None:
    tracemalloc.start()
    for step in (0, 1_000_000, 3_000_000):  # the last one in the second pass
        chosen = windows_of_step(step, 512, BILLION, seed=8)
        assert len(set(chosen.tolist())) == 512
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000  # bytes; a permutation of them all would take 8,000,000,000
    assert abs(chosen.mean() / BILLION - 0.5) < 0.1


@pytest.mark.parametrize("block", [None, 2_048, 3 * 10**8])
def test_no_window_of_a_billion_is_seen_twice_in_a_pass(block: int | None) -> None:
    chance = np.random.default_rng(0)
    run = np.arange(123_456_789, 123_456_789 + 100_000)  # neighbours, and samples from everywhere
    samples = np.union1d(run, chance.integers(0, BILLION, 100_000))
    if block == 2_048:  # every block has a permutation of its own: fewer of them
        samples = np.union1d(run[:20_000], chance.integers(0, BILLION, 500))
    orders = [
        windows_of_samples(samples + number * BILLION, BILLION, seed, block)
        for seed, number in itertools.product((8, 9), (0, 1))
    ]
    for chosen in orders:
        assert chosen.min() >= 0
        assert chosen.max() < BILLION
        assert len(np.unique(chosen)) == len(samples)
    for one, other in itertools.combinations(orders, 2):  # other passes and seeds are other orders
        assert (one == other).mean() < 0.01


@given(
    windows=st.integers(1, 300),
    more=st.integers(0, 300),
    block=st.integers(1, 60),
    seed=st.integers(0, 2**63 - 1),
)
def test_blocks_do_not_depend_on_what_follows(windows: int, more: int, block: int, seed: int) -> None:
    order = windows_of_samples(np.arange(2 * windows), windows, seed, block)
    for start in (0, windows):
        assert sorted(order[start : start + windows].tolist()) == list(range(windows))
    whole = windows // block * block
    longer = windows_of_samples(np.arange(whole), windows + more, seed, block)
    assert order[:whole].tolist() == longer.tolist()
    for first in range(0, whole, block):
        assert set(longer[first : first + block].tolist()) == set(range(first, first + block))


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=12), st.integers(0, 2**63 - 1))
def test_sources_of_a_mixture_have_exactly_their_shares(weights: list[float], seed: int) -> None:
    shares = shares_of(weights)
    assert sum(shares) == MIXTURE
    assert all(
        abs(share - weight / sum(weights) * MIXTURE) < 1
        for share, weight in zip(shares, weights, strict=True)
    )
    sources, numbers = sources_of_samples(np.arange(3 * MIXTURE), shares, seed)
    for index, share in enumerate(shares):
        for block in range(3):
            assert (sources[block * MIXTURE :][:MIXTURE] == index).sum() == share
        assert sorted(numbers[sources == index].tolist()) == list(range(3 * share))


def test_the_source_of_a_sample_does_not_depend_on_where_one_begins() -> None:
    shares = shares_of([0.7, 0.2, 0.1])
    sources, numbers = sources_of_samples(np.arange(5_000), shares, seed=8)
    late = sources_of_samples(np.arange(3_210, 3_333), shares, seed=8)
    assert np.array_equal(late, (sources[3_210:3_333], numbers[3_210:3_333]))
    assert (sources_of_samples(np.arange(5_000), shares, seed=9)[0] != sources).any()
    assert (sources[:1_000] != sources[1_000:2_000]).any()  # no two blocks alike


def test_remainders_go_to_the_largest() -> None:
    assert shares_of([1, 1, 1]) == (334, 333, 333)
    assert shares_of([2, 1]) == (667, 333)
    assert shares_of([0.7, 0.3]) == shares_of([70, 30]) == (700, 300)


def test_passes_are_shuffled_and_differ() -> None:
    one, two = (permute(np.arange(10_000), 10_000, 8, number) for number in (0, 1))
    for images in (one, two):
        assert abs(np.corrcoef(np.arange(10_000), images)[0, 1]) < 0.05
        assert (np.diff(images) == 1).sum() < 20  # neighbours are torn apart
    assert (one == two).sum() < 20


def test_a_window_needs_its_last_target() -> None:
    assert [window_count(tokens, 10) for tokens in (0, 10, 11, 20, 21)] == [0, 0, 1, 1, 2]


def times_trained_on(
    tokens: int, length: int, passes: int, seed: int = 8, block: int | None = None
) -> NDArray[np.int64]:
    """How often each token of a ring is a target in so many passes."""
    windows = -(-tokens // length)
    starts = starts_of_samples(np.arange(passes * windows), tokens, length, seed, block)
    targets = (starts[:, None] + np.arange(1, length + 1)) % tokens
    return np.bincount(targets.ravel(), minlength=tokens)


@given(
    length=st.integers(1, 40),
    more=st.integers(1, 300),
    number=st.integers(0, 10**6),
    block=st.none() | st.integers(1, 9),
)
def test_every_token_is_trained_on_once_or_twice_in_every_pass(
    length: int, more: int, number: int, block: int | None
) -> None:
    tokens = length + more
    windows = -(-tokens // length)
    samples = np.arange(number * windows, (number + 1) * windows)
    starts = starts_of_samples(samples, tokens, length, 8, block)
    first = pass_start(number, tokens)
    assert sorted((starts - first) % tokens) == list(range(0, windows * length, length))
    times = np.bincount(((starts[:, None] + np.arange(length)) % tokens).ravel(), minlength=tokens)
    assert set(times.tolist()) <= {1, 2}
    assert (times == 2).sum() == windows * length - tokens < length


@pytest.mark.parametrize("passes", [10, 100, 1_000])
@pytest.mark.parametrize(
    ("tokens", "length"),
    [(257, 256), (503, 256), (513, 256), (760, 256), (684, 256), (1_000, 64), (4_096, 64)],
)
def test_over_many_passes_every_token_has_the_same_weight(tokens: int, length: int, passes: int) -> None:
    times = times_trained_on(tokens, length, passes)
    assert times.sum() == passes * -(-tokens // length) * length
    assert times.max() - times.min() <= 4


def test_windows_begin_elsewhere_in_every_pass() -> None:
    starts = starts_of_samples(np.arange(16 * 20), 1_000, 64, seed=8).reshape(20, 16)  # 20 passes
    assert len({int(start) % 64 for start in starts[:, 0]}) > 10
    assert starts[0].tolist() != starts[1].tolist()
    again = starts_of_samples(np.arange(160, 200), 1_000, 64, seed=8)
    assert again.tolist() == starts.ravel()[160:200].tolist()


def test_the_first_pass_of_a_stream_does_not_depend_on_what_follows() -> None:
    blocks = 7 * 5  # seven whole blocks of five windows
    before = windows_of_samples(np.arange(blocks), blocks, 8, block=5) * 16
    after = starts_of_samples(np.arange(blocks), blocks * 16 + 123, 16, 8, block=5)
    assert before.tolist() == after.tolist()


def test_a_ring_of_a_trillion_tokens_costs_no_memory() -> None:
    tokens = 10**12 + 7
    windows = -(-tokens // 1_024)
    tracemalloc.start()
    for number in (0, 3, 999):
        starts = starts_of_samples(
            np.arange(number * windows - 100 * (number > 0), number * windows + 400), tokens, 1_024, 8
        )
        assert starts.min() >= 0
        assert starts.max() < tokens
        assert len(set(starts.tolist())) == len(starts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
