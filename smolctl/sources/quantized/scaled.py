"""Matrices of 8-bit integers with one scale, or one a row: the weights of `quantize_dynamic`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScaledMatrix:
    """weight = scale × value, with values in -128..127."""

    values: Tensor  # int8 (rows, columns)
    scales: Tensor  # float32 (1,), or (rows,) with one a row

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def bytes(self) -> int:
        """Size of both parts together."""
        return self.values.numel() + 4 * self.scales.numel()

    def dequantize(self) -> Tensor:
        """The matrix in float32: (rows, columns)."""
        return self.values.float().mul_(self.scales[:, None])
