"""The matmul of decoding, a packed matrix times one vector, in Numba and in smolctl's C.

    pip install numba
    python benchmarks/numba_product.py --rounds 15

49,152 × 576 values in groups of 32, as in SmolLM2's head, on one thread. Numba's loops use 16-bit
integers for the vector, like the C code. Prints milliseconds and ratios of interleaved rounds. The result was
the reason for C.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from smolctl.benchmark.limits import fastest_run
from smolctl.generation.native_engine import matrix_of
from smolctl.native.library import load_library
from smolctl.sources.arrays import Array
from smolctl.sources.quantized.packed import PackedMatrix, pack_integers
from smolctl.timing import in_turns, ratio_of

ROWS, COLUMNS, GROUP = 49_152, 576, 32


@njit(fastmath=True)
def int8_product(values, scales, x, units, y):  # type: ignore[no-untyped-def]
    for row in range(values.shape[0]):
        total = np.float32(0)
        for group in range(values.shape[1] // GROUP):
            part = np.int32(0)
            for at in range(group * GROUP, (group + 1) * GROUP):
                part += np.int32(values[row, at]) * np.int32(x[at])
            total += np.float32(part) * scales[row, group] * units[group]
        y[row] = total


@njit(fastmath=True)
def int4_product(values, scales, offsets, low, high, units, sums, y):  # type: ignore[no-untyped-def]
    half = GROUP // 2
    for row in range(values.shape[0]):
        total = np.float32(0)
        for group in range(values.shape[1] // half):
            part = np.int32(0)
            for at in range(group * half, (group + 1) * half):
                pair = values[row, at]
                part += np.int32(pair & 15) * np.int32(low[at]) + np.int32(pair >> 4) * np.int32(high[at])
            total += np.float32(part) * scales[row, group] * units[group] + offsets[row, group] * sums[group]
        y[row] = total


def random_matrix(bits: int) -> PackedMatrix:
    low, top = (0, 16) if bits == 4 else (-127, 128)
    values = pack_integers(torch.randint(low, top, (ROWS, COLUMNS)).numpy(), bits)
    scales = torch.rand(ROWS, COLUMNS // GROUP).half().numpy()
    offsets = np.float16(-8) * scales if bits == 4 else None
    return PackedMatrix(bits, COLUMNS, GROUP, values, scales, offsets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    library = load_library()
    assert not isinstance(library, str), library
    x = torch.randn(1, COLUMNS)
    groups = x[0].numpy().reshape(-1, GROUP)
    units = (np.abs(groups).max(1) / 32_767).astype(np.float32)
    integers = np.round(groups / units[:, None]).astype(np.int16)
    sums = groups.sum(1)
    low, high = (part.ravel().copy() for part in (integers[:, : GROUP // 2], integers[:, GROUP // 2 :]))
    keep: list[Array] = []

    def compiled(packed: PackedMatrix) -> Callable[[], NDArray[np.float32]]:
        matrix, y = matrix_of(packed, keep), torch.empty(1, ROWS)
        pointers = ctypes.byref(matrix), x.data_ptr(), 1, y.data_ptr()
        return lambda: (library.functions.smolctl_multiply(*pointers), y[0].numpy())[1]

    def numba(packed: PackedMatrix) -> Callable[[], NDArray[np.float32]]:
        scales, y = packed.scales.astype(np.float32), np.empty(ROWS, np.float32)
        if packed.offsets is None:
            values = packed.values.view(np.int8).reshape(ROWS, COLUMNS)
            arguments = (values, scales, integers.ravel(), units, y)
            return lambda: (int8_product(*arguments), y)[1]
        pairs = packed.values.view(np.uint8).reshape(ROWS, COLUMNS // 2)
        packed_arguments = (pairs, scales, packed.offsets.astype(np.float32), low, high, units, sums, y)
        return lambda: (int4_product(*packed_arguments), y)[1]

    for bits in (8, 4):
        packed = random_matrix(bits)
        ours, theirs = compiled(packed), numba(packed)
        # Both round x to 16 bits; what is left is the order of the sums.
        np.testing.assert_allclose(ours(), theirs(), rtol=1e-3, atol=0.05)
        fast, slow = in_turns([partial(fastest_run, one) for one in (ours, theirs)], options.rounds, 0)
        of, (ours_ms, theirs_ms) = ratio_of(slow, fast).spread, (1e3 * median(one) for one in (fast, slow))
        print(f"int{bits}: C {ours_ms:.2f} ms ({library.build}), Numba {theirs_ms:.2f} ms", end=", ")
        print(f"ratio {of.median:.1f} ({of.low:.1f} to {of.high:.1f})")


if __name__ == "__main__":
    main()
