"""Matrices of 8-bit integers with one scale, or one a row: the weights of `quantize_dynamic`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smolctl.sources.quantized.packed import PackedMatrix


@dataclass(frozen=True)
class ScaledMatrix:
    """weight = scale × value, with values in -128..127."""

    values: Tensor  # int8 (rows, columns)
    scales: Tensor  # float32 (1,), or (rows,) with one a row

    @classmethod
    def of(cls, matrix: Tensor) -> ScaledMatrix:
        """A quantized tensor (rows, columns) of PyTorch's, with one scale or one a row."""
        per_tensor = matrix.qscheme() == torch.per_tensor_affine
        scales = torch.tensor([matrix.q_scale()]) if per_tensor else matrix.q_per_channel_scales()
        return cls(matrix.int_repr(), scales.float())

    def quantized(self) -> Tensor:
        """The matrix as a quantized tensor of PyTorch's."""
        if self.scales.numel() == 1:
            return torch._make_per_tensor_quantized_tensor(self.values, self.scales.item(), 0)
        zeros = torch.zeros(len(self.scales), dtype=torch.long)
        return torch._make_per_channel_quantized_tensor(self.values, self.scales.double(), zeros, 0)

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


StoredTensor = Tensor | PackedMatrix | ScaledMatrix  # a tensor of a model as it is stored


def dense(stored: StoredTensor) -> Tensor:
    """A stored tensor in float32."""
    return stored.float() if isinstance(stored, Tensor) else stored.dequantize()
