"""Matrices of small integers: the form of quantized weights in memory and on disk.

The columns of a row form groups; a group's values share a scale and, with 4 or 5 bits, an offset:

    weight = scale × value            8 bits, value in -127..127
    weight = scale × value + offset   4 bits, value in 0..15; 5 bits, value in 0..31

With groups of 32 these are exactly GGUF's Q8_0, Q4_1 and Q5_1. Q4_0 and Q5_0 are the last two with the
offsets -8 × scale and -16 × scale, so these files are read without loss. `quantize` writes 8 or 4 bits in
groups of whole blocks; 5 bits, and groups of half a block, are for matrices of GGUF files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smolctl.sources.arrays import Array

# Columns stored together: of 32 four-bit values, byte i contains value i in its low nibble and value i + 16
# in its high one. Five-bit values have four bytes before these 16, in which bit i is the fifth bit of value
# i. Rows are zero-padded to a multiple of BLOCK; groups are a multiple or half of it.
BLOCK = 32
# Few enough that intermediate results stay in the CPU cache, and that torch does not wake its threads (which
# it does from 32,768 on). Their barriers cost more than the threads gain, and on a busy machine twenty times
# more: 0.7 s for 135 M values became 13 s.
VALUES_AT_ONCE = 32_000


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix (rows, columns) of 8-, 5- or 4-bit integers.

    Padding columns have the value 0; they are never dequantized.
    """

    bits: int  # 8, 5 or 4
    columns: int  # without padding
    group: int  # columns that share a scale: a multiple of BLOCK, or half of it
    values: Array  # (rows, P × bits / 8), P: columns padded to BLOCK; int8 with 8 bits, else uint8
    scales: NDArray[np.float16]  # (rows, groups)
    offsets: NDArray[np.float16] | None = None  # (rows, groups); not with 8 bits

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.columns

    @property
    def bytes(self) -> int:
        """Total size of all parts."""
        parts = (self.values, self.scales, self.offsets)
        return sum(part.nbytes for part in parts if part is not None)

    def largest(self) -> NDArray[np.float32]:
        """An upper bound of the absolute values of each group: (rows, groups)."""
        scales = self.scales.astype(np.float32)
        if self.offsets is None:
            return 128 * np.abs(scales)
        ends = self.offsets.astype(np.float32), self.offsets + ((1 << self.bits) - 1) * scales
        return np.maximum(*map(np.abs, ends))

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix in float32: (rows, columns)."""
        rows = self.values.shape[0]
        matrix = np.empty((rows, self.columns), np.float32)
        at_once = max(1, VALUES_AT_ONCE // max(1, self.columns))
        for start in range(0, rows, at_once):
            some = slice(start, start + at_once)
            matrix[some] = self._dequantized(some)
        return matrix

    def _dequantized(self, rows: slice) -> NDArray[np.float32]:
        values = unpack_integers(self.values[rows], self.bits)
        scales = self.scales[rows].astype(np.float32)[..., None]  # (rows, groups, 1)
        group = min(self.group, values.shape[1])
        padding = scales.shape[1] * group - values.shape[1]  # the last group may be shorter
        padded = np.pad(values, ((0, 0), (0, padding))) if padding else values
        grouped = padded.reshape(len(values), -1, group) * scales
        if self.offsets is not None:
            grouped += self.offsets[rows].astype(np.float32)[..., None]
        return grouped.reshape(len(values), -1)[:, : self.columns]


def unpack_integers(values: Array, bits: int) -> Array:
    """`PackedMatrix.values` as integers (rows, P), including padding."""
    if bits == 8:
        return values
    blocks = values.reshape(values.shape[0], -1, BLOCK * bits // 8)  # (rows, P/32, 16 or 20)
    fifths, pairs = blocks[..., : -BLOCK // 2], blocks[..., -BLOCK // 2 :]
    integers = np.concatenate((pairs & 0x0F, pairs >> 4), axis=-1)
    if bits == 5:
        integers |= np.unpackbits(fifths, axis=-1, bitorder="little") << 4
    return integers.reshape(values.shape[0], -1)


def pack_integers(values: Array, bits: int) -> Array:
    """Integers (rows, columns) as `PackedMatrix.values`, zero-padded."""
    whole = values.astype(np.int8 if bits == 8 else np.uint8)
    padded = np.pad(whole, ((0, 0), (0, -values.shape[1] % BLOCK)))
    if bits == 8:
        return padded
    blocks = padded.reshape(len(values), -1, BLOCK)
    packed = blocks[..., : BLOCK // 2] & 0x0F | blocks[..., BLOCK // 2 :] << 4  # (rows, P/32, 16)
    if bits == 5:
        packed = np.concatenate((np.packbits(blocks >> 4, axis=-1, bitorder="little"), packed), axis=-1)
    return packed.reshape(len(values), -1)
