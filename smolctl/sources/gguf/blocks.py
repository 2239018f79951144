"""GGUF's packed blocks as matrices of small integers or in float32, equal to the `gguf` package's values.

A block holds 32 values of one row, or 256: scales and offsets in float16, and the bits of the values.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from smolctl.errors import InputError
from smolctl.sources.quantized.packed import BLOCK, PackedMatrix

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Bits of a value, and how many float16 stand before the values of a block: the scale, and the offset.
PACKED = {"Q8_0": (8, 1), "Q4_0": (4, 1), "Q4_1": (4, 2)}


def as_stored(raw: Tensor, kind: GGMLQuantizationType) -> Tensor | PackedMatrix:
    """Rows as they are: floats in their own type, and the block types that a `PackedMatrix` can hold.

    Everything else is unpacked to float32, (rows, columns).

    Args:
        raw: bytes, uint8 of shape (rows, bytes per row).
        kind: how they are packed.

    Raises:
        InputError: nothing here can unpack the type.
    """
    if kind.name in PLAIN:
        plain = raw.view(PLAIN[kind.name])
        return plain.clone() if plain.dtype != torch.float64 else plain.float()
    if kind.name not in PACKED:
        return _unpacked(raw, kind)
    bits, halves = PACKED[kind.name]
    rows = raw.shape[0]
    blocks = raw.view(rows, -1, 2 * halves + BLOCK * bits // 8)  # (rows, groups, bytes)
    floats = blocks[..., : 2 * halves].contiguous().view(torch.float16)  # (rows, groups, 1 or 2)
    values = blocks[..., 2 * halves :].reshape(rows, -1)
    columns, scales = blocks.shape[1] * BLOCK, floats[..., 0].contiguous()
    if bits == 8:
        return PackedMatrix(8, columns, BLOCK, values.view(torch.int8), scales)
    offsets = floats[..., 1].contiguous() if halves == 2 else scales * -8
    if not offsets.isfinite().all():  # -8 × a scale may be more than float16 holds
        return _unpacked(raw, kind)
    return PackedMatrix(4, columns, BLOCK, values, scales, offsets)


def _unpacked(raw: Tensor, kind: GGMLQuantizationType) -> Tensor:
    from gguf import quants

    try:
        values = quants.dequantize(raw.numpy(), kind)
    except (NotImplementedError, KeyError):
        raise InputError(
            f"tensors of type {kind.name} cannot be read",
            "Use a GGUF of another quantization, such as Q8_0 or Q4_K_M.",
        ) from None
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


if sys.byteorder != "little":  # every view above takes the file's bytes as they are
    raise ImportError("GGUF files are little endian, and so must be the machine")
