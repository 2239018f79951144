"""GGUF's block formats as matrices of small integers or float32, with the same values as the `gguf` package.

A block contains 32 or 256 values of one row: scales and offsets in float16, and the bits of the values.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from smolctl.errors import InputError
from smolctl.sources.arrays import BFLOAT16, Array
from smolctl.sources.gguf.k_quants import K_QUANTS, recoded
from smolctl.sources.memory import weight_copy
from smolctl.sources.quantized.packed import BLOCK, PackedMatrix

PLAIN: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
}
# Bits per value, and number of float16 before the values of a block: the scale, and the offset.
PACKED = {"Q8_0": (8, 1), "Q4_0": (4, 1), "Q4_1": (4, 2), "Q5_0": (5, 1), "Q5_1": (5, 2)}


def as_stored(raw: Array, kind: str) -> Array | PackedMatrix:
    """Rows as stored: floats in their own type, and the block types that a `PackedMatrix` supports.

    Everything else is unpacked to float32, (rows, columns).

    Args:
        raw: bytes, uint8 of shape (rows, bytes per row).
        kind: their type, by llama.cpp's name.

    Raises:
        InputError: the type cannot be unpacked.
    """
    if kind in PLAIN:
        return raw.view(PLAIN[kind])
    if kind in K_QUANTS and (found := recoded(raw, kind)):
        return found
    if kind not in PACKED:
        return _unpacked(raw, kind)
    bits, halves = PACKED[kind]
    # Blocks as single items: copying 16 bytes at once is several times faster than one by one.
    parts = np.dtype([("floats", np.float16, (halves,)), ("values", f"V{BLOCK * bits // 8}")])
    blocks = raw.view(parts)  # (rows, groups)
    values, scales = weight_copy(blocks["values"]), weight_copy(blocks["floats"][..., 0])
    columns = blocks.shape[1] * BLOCK
    if bits == 8:
        return PackedMatrix(8, columns, BLOCK, values.view(np.int8), scales)
    with np.errstate(over="ignore"):
        middle = np.float16(-(2 ** (bits - 1)))
        offsets = weight_copy(blocks["floats"][..., 1] if halves == 2 else scales * middle)
    if not np.isfinite(offsets).all():  # they may exceed the range of float16
        return _unpacked(raw, kind)
    return PackedMatrix(bits, columns, BLOCK, values.view(np.uint8), scales, offsets)


def _unpacked(raw: Array, kind: str) -> Array:
    if kind == "F64":
        return raw.view(np.float64).astype(np.float32)
    from gguf import GGMLQuantizationType, quants

    try:
        values = quants.dequantize(raw, GGMLQuantizationType[kind])
    except (NotImplementedError, KeyError):
        raise InputError(
            f"tensors of type {kind.removeprefix('type ')} cannot be read",
            "Use a GGUF of another quantization, such as Q8_0 or Q4_K_M.",
        ) from None
    return np.ascontiguousarray(values, dtype=np.float32)


if sys.byteorder != "little":  # every view above assumes the file's byte order
    raise ImportError("GGUF files are little endian, and so must be the machine")
