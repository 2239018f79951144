"""GGUF's packed blocks as matrices of small integers or in float32, equal to the `gguf` package's values.

A block holds 32 values of one row, or 256: scales and offsets in float16, and the bits of the values.
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
# Bits of a value, and how many float16 stand before the values of a block: the scale, and the offset.
PACKED = {"Q8_0": (8, 1), "Q4_0": (4, 1), "Q4_1": (4, 2), "Q5_0": (5, 1), "Q5_1": (5, 2)}


def as_stored(raw: Array, kind: str) -> Array | PackedMatrix:
    """Rows as they are: floats in their own type, and the block types that a `PackedMatrix` can hold.

    Everything else is unpacked to float32, (rows, columns).

    Args:
        raw: bytes, uint8 of shape (rows, bytes per row).
        kind: how they are packed, by llama.cpp's name.

    Raises:
        InputError: nothing here can unpack the type.
    """
    if kind in PLAIN:
        return raw.view(PLAIN[kind])
    if kind in K_QUANTS and (found := recoded(raw, kind)):
        return found
    if kind not in PACKED:
        return _unpacked(raw, kind)
    bits, halves = PACKED[kind]
    # Blocks of one item each: copying 16 bytes at once is several times faster than one by one.
    parts = np.dtype([("floats", np.float16, (halves,)), ("values", f"V{BLOCK * bits // 8}")])
    blocks = raw.view(parts)  # (rows, groups)
    values, scales = weight_copy(blocks["values"]), weight_copy(blocks["floats"][..., 0])
    columns = blocks.shape[1] * BLOCK
    if bits == 8:
        return PackedMatrix(8, columns, BLOCK, values.view(np.int8), scales)
    with np.errstate(over="ignore"):
        middle = np.float16(-(2 ** (bits - 1)))
        offsets = weight_copy(blocks["floats"][..., 1] if halves == 2 else scales * middle)
    if not np.isfinite(offsets).all():  # these products may be more than float16 holds
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


if sys.byteorder != "little":  # every view above takes the file's bytes as they are
    raise ImportError("GGUF files are little endian, and so must be the machine")
