"""The source and window of a sample: a pure function of (seed, sample number).

The tokens are treated as a ring, in which the first token follows the last one. Each pass over the ring is
cut into the fewest windows of `sequence_length` tokens that cover it (each is read with one more token, its
last target): every token is trained on once, and less than a window of them twice. Passes start at different
tokens, so the twice-used tokens and the window boundaries differ between passes.

Sample number g of a source belongs to pass g // windows, and every pass has its own pseudo-random permutation
of the windows. The permutation is computed for the requested numbers and never stored, so a billion windows
cost as much as a thousand, and resuming is arithmetic.

A streamed source may grow when a run is extended. Its first pass starts at its first token, and its windows
are shuffled in consecutive blocks, which do not depend on later tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

# Version of the order that this file defines, stored in every checkpoint: a run continues only in the order
# with which it began. Order 1 began every pass at the first token and never read the tokens after the last
# whole window.
ORDER = 2
MIXTURE = 1_000  # consecutive samples that contain exactly the shares of the sources

# Rounds of the Feistel network. Four suffice for a pseudo-random permutation with good round functions (Luby
# and Rackoff, 1988); two more compensate for using a simple integer hash.
ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio
_STREAM, _MIXED = 1, 2  # first numbers of paths for `derived_seed`


def window_count(tokens: int, sequence_length: int) -> int:
    """Whole windows in a sequence of tokens: each needs one more token as its last target."""
    return max(0, (tokens - 1) // sequence_length)


def pass_start(number: int, tokens: int) -> int:
    """The token at which pass `number` of a ring starts; pass 0 starts at token 0.

    Every pass starts a golden section of the ring after the previous one. No other constant step spreads the
    starts more evenly, however many passes there are: in 1,000 passes, no token is read over 4 times more
    often than another one.
    """
    return (number * _GOLDEN % 2**64) * tokens >> 64


def starts_of_samples(
    samples: NDArray[np.int64], tokens: int, sequence_length: int, seed: int, block: int | None = None
) -> NDArray[np.int64]:
    """First tokens (n,) of the windows of the samples (n,) of one source that is treated as a ring.

    Args:
        samples: numbers from 0.
        tokens: of the ring, more than `sequence_length`.
        sequence_length: tokens of a window.
        seed, block: as in `windows_of_samples`.
    """
    windows = -(-tokens // sequence_length)
    passes, which = np.unique(samples // windows, return_inverse=True)
    starts = np.asarray([pass_start(int(number), tokens) for number in passes], dtype=np.int64)
    numbers = windows_of_samples(samples, windows, seed, block)
    return (starts[which] + numbers * sequence_length) % tokens


def windows_of_samples(
    samples: NDArray[np.int64], windows: int, seed: int, block: int | None = None
) -> NDArray[np.int64]:
    """Window numbers (n,) of the samples (n,) of one source.

    Args:
        samples: numbers from 0; the pass of a sample is samples // windows.
        windows: in the source; at least 1.
        seed: of the order.
        block: shuffle only within blocks of this many consecutive windows, so that the order of the first
            ones does not depend on how many follow; None shuffles all of them.
    """
    passes, positions = np.divmod(samples, windows)
    if block is None:
        return _permuted(positions, passes, lambda _: windows, seed)
    blocks, places = np.divmod(positions, block)
    chosen = np.empty_like(positions)
    for number in np.unique(passes):
        here = passes == number
        pass_seed = derived_seed(seed, _STREAM, int(number))
        chosen[here] = _permuted(
            places[here], blocks[here], lambda index: min(block, windows - index * block), pass_seed
        )
    return blocks * block + chosen


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """How many samples of every `MIXTURE` come from each source: exactly `MIXTURE` in total.

    Shares are rounded down, and the rest goes to the largest remainders.
    """
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * MIXTURE
    shares = np.floor(exact).astype(np.int64)
    most = np.argsort(shares - exact, kind="stable")  # largest remainder first
    shares[most[: MIXTURE - int(shares.sum())]] += 1
    return tuple(int(share) for share in shares)


def sources_of_samples(
    samples: NDArray[np.int64], shares: Sequence[int], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The source of each sample, and the sample's number within that source: (n,) and (n,).

    Every `MIXTURE` consecutive samples contain exactly the shares, each time in a different pseudo-random
    order. Within a source, the numbers 0, 1, 2 ... are all used exactly once.

    Args:
        samples: numbers (n,) from 0.
        shares: of the sources, as `shares_of` gives them.
        seed: of the order.
    """
    blocks, positions = np.divmod(samples, MIXTURE)
    slots = _permuted(positions, blocks, lambda _: MIXTURE, derived_seed(seed, _MIXED))
    share = np.asarray(shares, dtype=np.int64)
    ends = np.cumsum(share)
    source = np.searchsorted(ends, slots, side="right").astype(np.int64)
    return source, blocks * share[source] + slots - (ends - share)[source]


def derived_seed(seed: int, *path: int) -> int:
    """A separate seed for every path of numbers."""
    state = np.asarray([seed], dtype=np.uint64)
    for number in path:
        state = _mix(state ^ _mix(np.asarray([number], dtype=np.uint64)))
    return int(state[0])


def _permuted(
    positions: NDArray[np.int64], numbers: NDArray[np.int64], size: Callable[[int], int], seed: int
) -> NDArray[np.int64]:
    """Every position under the permutation with its number, of range(size(number))."""
    images = np.empty_like(positions)
    for number in np.unique(numbers):
        here = numbers == number
        images[here] = permute(positions[here], size(int(number)), seed, int(number))
    return images


def permute(positions: NDArray[np.int64], size: int, seed: int, number: int) -> NDArray[np.int64]:
    """Images of `positions` under permutation `number` of range(size).

    A Feistel network permutes the smallest range of 4^k numbers that contains `size`; images of `size` or
    more are permuted again until they are in range ("cycle walking"), at most four times on average.
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
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): every input bit affects every output bit."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
