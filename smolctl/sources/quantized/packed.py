"""Matrices of small integers: how quantized weights lie in memory and on disk.

The columns of a row form groups; a group's values share a scale and, with 4 bits, an offset:

    weight = scale × value            8 bits, value in -127..127
    weight = scale × value + offset   4 bits, value in 0..15

Both are exactly what GGUF calls Q8_0 and Q4_1 (with groups of 32), and Q4_0 is the second one with the
offset -8 × scale, so that those files are read without a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns that lie together: of 32 four-bit values, byte i holds value i low and value i + 16 high.
# Rows are filled up with zeros to a multiple of it, groups are a multiple of it.
BLOCK = 32
# Few enough that the intermediate results stay in the cache and torch does not wake its threads (it does from
# 32,768 on). Their barriers cost more than they bring, and on a busy machine twenty times more: 0.7 s for
# 135 M values became 13 s.
VALUES_AT_ONCE = 32_000


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix (rows, columns) of 8- or 4-bit integers.

    Padding columns hold the value 0; what they would dequantize to is never used.
    """

    bits: int  # 8 or 4
    columns: int  # of the matrix, without padding
    group: int  # columns that share a scale: a multiple of BLOCK
    values: Tensor  # 8 bits: int8 (rows, P); 4 bits: uint8 (rows, P / 2); P: columns filled up to BLOCK
    scales: Tensor  # float16 (rows, groups)
    offsets: Tensor | None = None  # float16 (rows, groups); with 4 bits only

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.columns

    @property
    def bytes(self) -> int:
        """Size of all parts together."""
        parts = (self.values, self.scales, self.offsets)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def dequantize(self) -> Tensor:
        """The matrix in float32: (rows, columns)."""
        rows = self.values.shape[0]
        matrix = torch.empty(rows, self.columns)
        at_once = max(1, VALUES_AT_ONCE // max(1, self.columns))
        for start in range(0, rows, at_once):
            some = slice(start, start + at_once)
            matrix[some] = self._dequantized(some)
        return matrix

    def _dequantized(self, rows: slice) -> Tensor:
        values = unpack_integers(self.values[rows], self.bits)
        scales = self.scales[rows].float().unsqueeze(-1)  # (rows, groups, 1)
        group = min(self.group, values.shape[1])
        padding = scales.shape[1] * group - values.shape[1]  # the last group may be shorter
        grouped = torch.nn.functional.pad(values.float(), (0, padding)).view(len(values), -1, group)
        grouped.mul_(scales)
        if self.offsets is not None:
            grouped.add_(self.offsets[rows].float().unsqueeze(-1))
        return grouped.view(len(values), -1)[:, : self.columns]


def unpack_integers(values: Tensor, bits: int) -> Tensor:
    """`PackedMatrix.values` as integers (rows, P), zeros of the padding included."""
    if bits == 8:
        return values
    blocks = values.view(values.shape[0], -1, BLOCK // 2)  # (rows, P/32, 16)
    return torch.cat((blocks & 0x0F, blocks >> 4), dim=-1).view(values.shape[0], -1)


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """Integers (rows, columns) as `PackedMatrix.values`, filled up with zeros."""
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % BLOCK))
    if bits == 8:
        return padded.to(torch.int8).contiguous()
    low, high = padded.to(torch.uint8).view(rows, -1, 2, BLOCK // 2).unbind(dim=2)  # (rows, P/32, 16)
    return (low | high << 4).view(rows, -1).contiguous()
