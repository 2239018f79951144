"""llama.cpp's K-quants as matrices of small integers, at about their size in the file.

A block contains 256 values of one row. The scales and offsets of its groups of 16 or 32 are small integers
times a float16 factor of the block. A `PackedMatrix` has a float16 for each of them: the values do not
change, and scales and offsets are rounded by at most one part in 2,048.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from smolctl.sources.arrays import Array
from smolctl.sources.gguf.header import K_BLOCK
from smolctl.sources.memory import weight_array
from smolctl.sources.quantized.packed import PackedMatrix, pack_integers

VALUES_AT_ONCE = 1 << 18  # few enough that intermediate results fit the CPU cache
# Bits and group of the `PackedMatrix` for a type, and the fields of a block: `low` and `high` are the bits of
# its values, `d` is the factor of its scales and `dmin` that of its offsets.
K_QUANTS: Mapping[str, tuple[int, int, list[tuple[Any, ...]]]] = {
    "Q2_K": (4, 16, [("scales", "u1", 16), ("low", "u1", 64), ("d", "f2", 1), ("dmin", "f2", 1)]),
    "Q3_K": (4, 16, [("high", "u1", 32), ("low", "u1", 64), ("scales", "u1", 12), ("d", "f2", 1)]),
    "Q4_K": (4, 32, [("d", "f2", 1), ("dmin", "f2", 1), ("scales", "u1", 12), ("low", "u1", 128)]),
    "Q5_K": (
        5,
        32,
        [("d", "f2", 1), ("dmin", "f2", 1), ("scales", "u1", 12), ("high", "u1", 32), ("low", "u1", 128)],
    ),
    "Q6_K": (8, 16, [("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "f2", 1)]),
}


def recoded(raw: Array, kind: str) -> PackedMatrix | None:
    """Convert rows of K-quants to a matrix of integers.

    Args:
        raw: bytes, uint8 of shape (rows, bytes per row).
        kind: one of `K_QUANTS`.

    Returns:
        The matrix; None if a scale or an offset exceeds float16.
    """
    bits, group, fields = K_QUANTS[kind]
    blocks = raw.view(np.dtype(fields))  # (rows, columns / 256)
    rows, columns = len(blocks), blocks.shape[1] * K_BLOCK
    values = weight_array((rows, columns * bits // 8), np.int8 if bits == 8 else np.uint8)
    factors = weight_array((1 if bits == 8 else 2, rows, columns // group), np.float16)
    at_once = max(1, VALUES_AT_ONCE // columns)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, rows, at_once):
            some = slice(start, start + at_once)
            integers, *found = _parts(kind, {name: blocks[some][name] for name, *_ in fields})
            values[some] = pack_integers(integers.reshape(-1, columns), bits)
            factors[:, some] = np.reshape(found, (len(factors), -1, columns // group))
    if not np.isfinite(factors).all():
        return None
    return PackedMatrix(bits, columns, group, values, *factors)


def _parts(kind: str, block: Mapping[str, Array]) -> tuple[Array, ...]:
    """Values, scales and offsets, with the block axes first. Q6_K has no offsets."""
    low, scales, factor = block["low"], block["scales"], block["d"].astype(np.float32)
    if kind == "Q6_K":
        integers = _fields(low, 4, 64) | _fields(block["high"], 2) << 4
        return integers.view(np.int8) - np.int8(32), factor * scales
    if kind == "Q3_K":  # a stored scale of 32 and a stored value of 4 mean 0
        tops = _fields(scales[..., 8:], 2, 4)
        scaled = factor * ((_fields(scales[..., :8], 4, 8) | tops << 4).astype(np.float32) - 32)
        return _fields(low, 2) | _fields(block["high"], 1) << 2, scaled, -4 * scaled
    offset = -block["dmin"].astype(np.float32)
    if kind == "Q2_K":
        return _fields(low, 2), factor * (scales & 15), offset * (scales >> 4)
    # 8 scales and 8 offsets of 6 bits: four scales, with the upper bits of the other four above them; the
    # same for the offsets; then the lower bits of the others.
    first, second, rest = np.split(scales, 3, axis=-1)
    all_scales = np.concatenate((first & 63, rest & 15 | first >> 2 & 48), axis=-1)
    all_offsets = np.concatenate((second & 63, rest >> 4 | second >> 2 & 48), axis=-1)
    integers = _fields(low, 4)
    if kind == "Q5_K":
        integers |= _fields(block["high"], 1) << 4
    return integers, factor * all_scales, offset * all_offsets


def _fields(packed: Array, bits: int, width: int = 32) -> Array:
    """Bit fields of the bytes in the last axis: the lowest field of `width` bytes, then the next ones."""
    parts = packed.reshape(*packed.shape[:-1], -1, width)
    fields = [parts >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return np.stack(fields, axis=-2).reshape(*packed.shape[:-1], -1)
