"""The machine's limits, measured in every round, and the share of them that a workload reaches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

# Larger than the last-level caches of today's processors, in most cases several times.
BUFFER_BYTES = 256 << 20
# Rows and columns of the matmuls: large enough to be compute-bound, small enough for a laptop.
SIZE = 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A matmul of a narrow type may be computed in any wider type if that is faster on this machine.
WIDER = {
    "float32": ("float32",),
    "bfloat16": ("bfloat16", "float32"),
    "int8": ("int8", "bfloat16", "float32"),
}


@dataclass(frozen=True)
class HardwareLimits:
    """Rates of the machine: the best of all rounds, because disturbances can only lower them."""

    bandwidth: float  # bytes per second when reading memory
    products: dict[str, float]  # FLOP/s of matmuls by type, two operations for each multiply-add
    slowest_bandwidth: float  # lowest of all rounds: shows how steady the machine was
    slowest_products: dict[str, float]


@dataclass(frozen=True)
class Cost:
    """The minimum of memory traffic and arithmetic of a workload."""

    bytes: float = 0.0  # read from memory
    flops: float = 0.0
    dtype: str = "float32"  # of the matmuls: a key of WIDER


class LimitMeter:
    """Measures the machine once a round."""

    def __init__(self) -> None:
        self._buffer = torch.ones(BUFFER_BYTES // 4)
        generator = torch.Generator().manual_seed(0)
        square = torch.randn(SIZE, SIZE, generator=generator)
        self._squares = {name: square.to(dtype) for name, dtype in DTYPES.items()}
        self._small = (square * 16).to(torch.int8)
        self.rounds: list[tuple[float, dict[str, float]]] = []  # bandwidth and products, as in HardwareLimits

    def measure(self) -> None:
        """Measure one round, which takes about half a second."""
        reads = (self._buffer.sum, lambda: torch.linalg.vector_norm(self._buffer))
        bandwidth = max(BUFFER_BYTES / fastest_run(read, 3) for read in reads)
        work = 2.0 * SIZE**3
        products = {
            name: work / fastest_run(partial(torch.matmul, square, square), 3)
            for name, square in self._squares.items()
        }
        with contextlib.suppress(RuntimeError, AttributeError):  # not available in every build of PyTorch
            products["int8"] = work / fastest_run(lambda: torch._int_mm(self._small, self._small), 3)
        self.rounds.append((bandwidth, products))


def limits_of(rounds: Sequence[tuple[float, dict[str, float]]]) -> HardwareLimits:
    """The best and the worst round of each rate."""
    names = rounds[0][1].keys()
    return HardwareLimits(
        max(bandwidth for bandwidth, _ in rounds),
        {name: max(products[name] for _, products in rounds) for name in names},
        min(bandwidth for bandwidth, _ in rounds),
        {name: min(products[name] for _, products in rounds) for name in names},
    )


def roofline(cost: Cost, seconds: float, limits: HardwareLimits) -> tuple[float, str] | tuple[None, None]:
    """The share of the limit that applies, and its name; None for both if the cost is not known.

    A workload takes at least the time to read its bytes and at least the time for its arithmetic; the longer
    of the two is the limit.
    """
    if not cost.bytes and not cost.flops:
        return None, None
    rates = {name: limits.products[name] for name in WIDER[cost.dtype] if name in limits.products}
    fastest = max(rates, key=lambda name: rates[name])
    reading, computing = cost.bytes / limits.bandwidth, cost.flops / rates[fastest]
    if reading >= computing:
        return reading / seconds, "memory"
    return computing / seconds, f"products in {fastest}"


def fastest_run(work: Callable[[], object], times: int = 1) -> float:
    """Seconds of the fastest of several runs."""
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
