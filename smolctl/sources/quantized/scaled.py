"""Matrices of 8-bit integers with one scale, or one per row: the weights of `quantize_dynamic`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from smolctl.sources.arrays import Array, as_array, as_float32, as_tensor
from smolctl.sources.quantized.packed import PackedMatrix

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScaledMatrix:
    """weight = scale × value, with values in -128..127."""

    values: NDArray[np.int8]  # (rows, columns)
    scales: NDArray[np.float32]  # (1,), or (rows,) with one per row

    @classmethod
    def of(cls, matrix: torch.Tensor) -> ScaledMatrix:
        """Convert a quantized PyTorch tensor (rows, columns) with one scale, or one per row."""
        import torch

        per_tensor = matrix.qscheme() == torch.per_tensor_affine
        scales = torch.tensor([matrix.q_scale()]) if per_tensor else matrix.q_per_channel_scales()
        return cls(as_array(matrix.int_repr()), as_array(scales.float()))

    def quantized(self) -> torch.Tensor:
        """The matrix as a quantized PyTorch tensor."""
        import torch

        values, scales = as_tensor(self.values), as_tensor(self.scales)
        if scales.numel() == 1:
            return torch._make_per_tensor_quantized_tensor(values, scales.item(), 0)
        zeros = torch.zeros(len(scales), dtype=torch.long)
        return torch._make_per_channel_quantized_tensor(values, scales.double(), zeros, 0)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def bytes(self) -> int:
        """Total size of both parts."""
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix in float32: (rows, columns)."""
        return self.values * self.scales[:, None]


StoredTensor = Array | PackedMatrix | ScaledMatrix  # a tensor of a model as it is stored


def dense(stored: StoredTensor) -> NDArray[np.float32]:
    """A stored tensor in float32."""
    return as_float32(stored) if isinstance(stored, np.ndarray) else stored.dequantize()
