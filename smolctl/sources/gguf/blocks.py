"""GGUF's packed blocks into float32, equal to the `gguf` package's values to the last bit.

The common types are unpacked here with torch; the rest is left to `gguf.quants`. A block holds 32
values of one row: a scale d (float16), for the `_1` types an offset m (float16), for the 5-bit
types the 32 high bits, and the low bits, two values a byte: the first 16 values in the low halves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from smolctl.errors import InputError
from smolctl.sources.gguf.header import TensorType
from smolctl.sources.quantized.packed import BLOCK, PackedMatrix

# 32,000 values at once: the intermediate results stay in the cache, and torch does not wake its
# threads (it does from 32,768 on). Their barriers cost more than they bring, and on a machine that is
# busy with something else twenty times more: 0.7 s for 135 M values became 13 s.
BLOCKS_AT_ONCE = 1_000


def dequantize(raw: Tensor, kind: TensorType) -> Tensor:
    """Unpack rows.

    Args:
        raw: bytes, uint8 of shape (rows, bytes per row).
        kind: how they are packed.

    Returns:
        float32 of shape (rows, columns).

    Raises:
        InputError: nothing here can unpack the type.
    """
    if kind.name in PLAIN:
        return raw.view(PLAIN[kind.name]).float()
    unpack = PACKED.get(kind.name)
    if unpack is None:
        return _through_gguf(raw, kind)
    blocks = raw.reshape(-1, kind.bytes)
    values = torch.empty(blocks.shape[0], BLOCK)
    for start in range(0, blocks.shape[0], BLOCKS_AT_ONCE):
        some = slice(start, start + BLOCKS_AT_ONCE)
        unpack(blocks[some], values[some])
    return values.view(raw.shape[0], -1)


def as_stored(raw: Tensor, kind: TensorType) -> Tensor | PackedMatrix:
    """Rows as they are: floats in their own type, and the block types that a `PackedMatrix` can hold.

    Everything else is unpacked to float32, (rows, columns).

    Raises:
        InputError: as `dequantize`.
    """
    if kind.name in PLAIN:
        plain = raw.view(PLAIN[kind.name])
        return plain.clone() if plain.dtype != torch.float64 else plain.float()
    if kind.name not in ("Q8_0", "Q4_0", "Q4_1") or raw.shape[0] == 1:
        return dequantize(raw, kind)
    rows = raw.shape[0]
    blocks = raw.view(rows, -1, kind.bytes)  # (rows, groups, bytes)
    halves = blocks[..., : 4 if kind.name == "Q4_1" else 2].contiguous().view(torch.float16)
    bits, columns = (8 if kind.name == "Q8_0" else 4), blocks.shape[1] * BLOCK
    values = blocks[..., -BLOCK * bits // 8 :].reshape(rows, -1)
    scales = halves[..., 0].contiguous()
    if bits == 8:
        return PackedMatrix(8, columns, BLOCK, values.view(torch.int8), scales)
    offsets = halves[..., 1].contiguous() if kind.name == "Q4_1" else scales * -8
    return PackedMatrix(4, columns, BLOCK, values, scales, offsets)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of every block, as float32: (blocks, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, out: Tensor) -> Tensor:
    """(blocks, 16) bytes as (blocks, 32) values of four bits: low halves first."""
    low, high = out.chunk(2, dim=1)
    low.copy_(packed & 0x0F)
    high.copy_(packed >> 4)
    return out


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """The high bit of each of 32 values, in its place: (blocks, 32) of 0 or 16."""
    high = blocks[:, start : start + 4].unsqueeze(-1)  # (blocks, 4, 1)
    bits = (high >> torch.arange(8, dtype=torch.uint8)) & 1  # (blocks, 4, 8)
    return (bits << 4).view(-1, BLOCK)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    torch.mul(blocks[:, 2:].view(torch.int8), _half(blocks, 0), out=out)


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 2:], out).sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 4:], out).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 6:], out).add_(_fifth_bits(blocks, 2)).sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 8:], out).add_(_fifth_bits(blocks, 4)).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PACKED: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
}


def _through_gguf(raw: Tensor, kind: TensorType) -> Tensor:
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    try:
        values = quants.dequantize(raw.numpy(), GGMLQuantizationType[kind.name])
    except (NotImplementedError, KeyError):
        raise InputError(
            f"tensors of type {kind.name} cannot be read",
            "Use a GGUF of another quantization, such as Q8_0 or Q4_K_M.",
        ) from None
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


if sys.byteorder != "little":  # every view above takes the file's bytes as they are
    raise ImportError("GGUF files are little endian, and so must be the machine")
