"""Measuring on machines that others use too: work in turns, what may be said of the numbers, and memory.

A single time on a shared machine means little. Here several pieces of work take turns, round by round, so
that the numbers of one round are neighbours in time and their ratio cancels most of what disturbs them both.
What is reported is a median, never a best; whether a difference is more than noise is decided by a rule that
assumes nothing about how times are distributed (see `median_interval`).
"""

from __future__ import annotations

import sys
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
    """`2.1906 ± 0.0294`, or the mean alone where one measurement gives no error."""
    return format(mean, form) + ("" if standard_error is None else f" ± {standard_error:.4f}")


@dataclass(frozen=True)
class Spread:
    """The median of several measurements and what lies around it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(median(values), min(values), max(values))


@dataclass(frozen=True)
class Ratio:
    """How many times one series is another, from the ratios of neighbours."""

    spread: Spread
    interval: tuple[float, float] | None  # of the median, at CONFIDENCE; None: too few rounds

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the interval leaves out 1; None when there are too few rounds to decide."""
        return None if self.interval is None else not self.interval[0] <= 1.0 <= self.interval[1]


def in_turns(
    works: Sequence[Callable[[], T]],
    rounds: int,
    warmups: int = 1,
    after_round: Callable[[int], None] = lambda _round: None,
) -> list[list[T]]:
    """Do every piece of work once a round.

    The order turns around from round to round: a machine that slows down within each favours none.

    Args:
        works: each returns what it has measured of itself.
        rounds: that count.
        warmups: rounds before, whose results are dropped.
        after_round: called with 0 after the last warm-up, then 1, 2, ... after each round that counts.

    Returns:
        For each piece of work its results, round by round.
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
    """An interval that holds the true median with this probability, whatever the distribution.

    A measurement lies below the true median with probability 1/2, so that the k-th smallest of N lies above
    it as seldom as a fair coin shows fewer than k heads in N throws. Of six values the smallest and the
    largest will do, of nine the second and the eighth; of five no two will, and the answer is None.
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
    """Ours over theirs, round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(Spread.of(ratios), median_interval(ratios))


def peak_memory(device: torch.device | None = None) -> int | None:
    """Most bytes held so far: by tensors on a CUDA device, else by this process in main memory.

    None where the operating system does not say. Linux counts roughly: by a few pages the peak may fall.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return _process_memory("VmHWM")


def resident_memory() -> int | None:
    """Bytes of main memory that this process holds now; None where the operating system does not say."""
    return _process_memory("VmRSS")


def _process_memory(field: str) -> int | None:
    status = Path("/proc/self/status")  # Linux's getrusage would count what the parent process held
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
    if sys.platform == "win32":
        return None
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024  # bytes on macOS, kilobytes elsewhere
