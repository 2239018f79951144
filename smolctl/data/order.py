"""Which windows of the corpus a step trains on: a pure function of (seed, step).

The tokens are cut into windows of `sequence_length` (each read with one token more, its last target).
Sample number g = step × batch_size + slot of the whole run lies in pass g // windows, and every pass
is another pseudo-random permutation of the windows. The permutation is computed for the numbers asked
for and never stored, so a billion windows cost what a thousand cost, and resuming is arithmetic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Rounds of the Feistel network. Four suffice for a pseudo-random permutation given good round
# functions (Luby and Rackoff, 1988); two more make up for ours being a plain integer hash.
ROUNDS = 6


def window_count(tokens: int, sequence_length: int) -> int:
    """Windows in a stream: each needs one token after its end as the last target."""
    return max(0, (tokens - 1) // sequence_length)


def windows_of_step(step: int, batch_size: int, windows: int, seed: int) -> NDArray[np.int64]:
    """Window numbers (batch_size,) of the optimizer step `step`, counted from 0.

    Args:
        step: steps before this one.
        batch_size: sequences a step over all devices; each device takes an equal run of them.
        windows: windows in the corpus; at least 1.
        seed: of the order.
    """
    return windows_of_samples(step * batch_size, batch_size, windows, seed)


def windows_of_samples(first: int, count: int, windows: int, seed: int) -> NDArray[np.int64]:
    """Window numbers (count,) of the samples `first`, `first` + 1, ... of the whole run."""
    samples = np.arange(first, first + count, dtype=np.int64)
    passes, positions = np.divmod(samples, windows)
    chosen = np.empty_like(positions)
    for number in np.unique(passes):
        here = passes == number
        chosen[here] = permute(positions[here], windows, seed, int(number))
    return chosen


def permute(positions: NDArray[np.int64], size: int, seed: int, number: int) -> NDArray[np.int64]:
    """Images of `positions` under permutation `number` of range(size).

    A Feistel network permutes the smallest range of 4^k numbers that holds `size`; an image beyond
    `size` is sent through again until it falls inside ("cycle walking"), four times at most on average.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = _mix(np.uint64(seed) + _mix(np.arange(ROUNDS, dtype=np.uint64) + np.uint64(number * ROUNDS)))
    images = positions.astype(np.uint64)
    outside = np.ones(images.shape, dtype=bool)
    while outside.any():
        left, right = images[outside] >> half_bits, images[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        images[outside] = left << half_bits | right
        outside &= images >= np.uint64(size)
    return images.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): every bit in changes every bit out."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
