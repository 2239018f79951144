"""Measurements on shared machines: taking turns, statistics of the results, and memory.

A single time on a shared machine means little. Here several pieces of work take turns in every round, so that
the times of one round are close together and their ratio cancels most disturbances. Results are medians,
never best values; whether a difference is more than noise is decided without assumptions about the
distribution of times (see `median_interval`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
CONFIDENCE = 0.95


def with_error(mean: float, standard_error: float | None, form: str = ".4f") -> str:
    """`2.1906 ± 0.0294`, or only the mean if a single measurement has no error."""
    return format(mean, form) + ("" if standard_error is None else f" ± {standard_error:.4f}")


@dataclass(frozen=True)
class Spread:
    """The median and the range of several measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(median(values), min(values), max(values))


@dataclass(frozen=True)
class Ratio:
    """The ratio of two series, from the ratios within each round."""

    spread: Spread
    interval: tuple[float, float] | None  # of the median, at CONFIDENCE; None: too few rounds

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the interval excludes 1; None if there are too few rounds to decide."""
        return None if self.interval is None else not self.interval[0] <= 1.0 <= self.interval[1]


def in_turns(
    works: Sequence[Callable[[], T]],
    rounds: int,
    warmups: int = 1,
    after_round: Callable[[int], None] = lambda _round: None,
) -> list[list[T]]:
    """Do every piece of work once per round.

    The order is reversed from round to round, so a machine that slows down favours none.

    Args:
        works: each returns its own measurement.
        rounds: number of rounds that count.
        warmups: rounds before them, whose results are dropped.
        after_round: called with 0 after the last warm-up, then 1, 2, ... after each round that counts.

    Returns:
        For each piece of work, its results by round.
    """
    results: list[list[T]] = [[] for _ in works]
    for number in range(1 - warmups, rounds + 1):
        order = range(len(works)) if number % 2 else range(len(works) - 1, -1, -1)
        for index in order:
            result = works[index]()
            if number > 0:
                results[index].append(result)
        if number >= 0:
            after_round(number)
    return results


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """An interval that contains the true median with this probability, for any distribution.

    A measurement is below the true median with probability 1/2, so the probability that the k-th smallest of
    N is above it is that of fewer than k heads in N throws of a fair coin. Of six values, the smallest and
    the largest suffice; of nine, the second and the eighth; of five, no two do, and the result is None.
    """
    ordered, count = sorted(values), len(values)
    outside, rank, tail = (1 - confidence) / 2, 0, 0.0
    while rank < count // 2:
        tail += comb(count, rank) / 2**count  # P(fewer than rank + 1 heads)
        if tail > outside:
            break
        rank += 1
    return (ordered[rank - 1], ordered[count - rank]) if rank else None


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """smolctl's values divided by the other's, by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(Spread.of(ratios), median_interval(ratios))


def synchronized_time(device: torch.device) -> float:
    """Seconds of a monotonic clock, after a CUDA device has finished its work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device | None = None) -> int | None:
    """Peak memory so far: of tensors on a CUDA device, else of this process in main memory.

    None if the operating system does not report it. Linux counts imprecisely: the peak may decrease by a few
    pages.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return _process_memory("VmHWM")


def resident_memory() -> int | None:
    """Bytes of main memory used by this process now; None if the operating system does not report it."""
    return _process_memory("VmRSS")


def _process_memory(field: str) -> int | None:
    status = Path("/proc/self/status")  # Linux's getrusage would include the parent process's peak
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
    if sys.platform == "win32":
        return None
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024  # bytes on macOS, kilobytes elsewhere
