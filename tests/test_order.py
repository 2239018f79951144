"""The order of the data: a permutation in every pass, computed and never stored."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from smolctl.data.order import permute, window_count, windows_of_step


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), number=st.integers(0, 10**6))
def test_every_pass_is_a_permutation(size: int, seed: int, number: int) -> None:
    images = permute(np.arange(size), size, seed, number)
    assert sorted(images.tolist()) == list(range(size))


@given(windows=st.integers(1, 500), batch=st.integers(1, 40), seed=st.integers(0, 1000))
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
    windows = 10**9
    first = windows_of_step(0, 512, windows, seed=8)
    late = windows_of_step(3_000_000, 512, windows, seed=8)  # in the second pass
    for chosen in (first, late):
        assert len(set(chosen.tolist())) == 512
        assert chosen.min() >= 0
        assert chosen.max() < windows
    assert abs(first.mean() / windows - 0.5) < 0.1


def test_passes_are_shuffled_and_differ() -> None:
    one, two = (permute(np.arange(10_000), 10_000, 8, number) for number in (0, 1))
    for images in (one, two):
        assert abs(np.corrcoef(np.arange(10_000), images)[0, 1]) < 0.05
        assert (np.diff(images) == 1).sum() < 20  # neighbours are torn apart
    assert (one == two).sum() < 20


def test_a_window_needs_its_last_target() -> None:
    assert [window_count(tokens, 10) for tokens in (0, 10, 11, 20, 21)] == [0, 0, 1, 1, 2]
