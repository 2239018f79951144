"""A model's tensors as NumPy arrays, and as PyTorch tensors for code that computes with PyTorch.

NumPy has no bfloat16 and no 8-bit floats. Arrays of these have a structured type of one field, which contains
the bits and is named like PyTorch's type, so that no NumPy operator mistakes them for integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]


def type_named(name: str, size: int) -> np.dtype[Any]:
    """The NumPy type for PyTorch's type `name` with `size` bytes per item."""
    try:
        return np.dtype(name)
    except TypeError:
        return np.dtype([(name, f"u{size}")])


BFLOAT16 = type_named("bfloat16", 2)


def name_of(dtype: np.dtype[Any]) -> str:
    """PyTorch's name of a type: "float32", "bfloat16"."""
    return dtype.names[0] if dtype.names else dtype.name


def as_float32(array: Array) -> NDArray[np.float32]:
    """The values of an array of floats; an array of float32 is returned as it is."""
    if array.dtype == BFLOAT16:
        bits = array.view(np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if array.dtype.names:
        narrow: Array = as_tensor(array).float().numpy()
        return narrow
    return array.astype(np.float32, copy=False)


def as_bfloat16(array: Array) -> Array:
    """The values of an array of floats, rounded to bfloat16, ties to even."""
    values = as_float32(array)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0  # the addition may have turned it into infinity
    return rounded.view(BFLOAT16)


def as_tensor(array: Array) -> torch.Tensor:
    """A tensor on the CPU that shares the array's memory."""
    import torch

    if not array.dtype.names:
        return torch.from_numpy(array)
    bits = torch.from_numpy(array.view(f"u{array.itemsize}"))
    return bits.view(getattr(torch, name_of(array.dtype)))


def as_array(tensor: torch.Tensor) -> Array:
    """The values of a tensor, sharing its memory if that is on the CPU."""
    import torch

    tensor = tensor.detach().cpu()
    dtype = type_named(str(tensor.dtype).removeprefix("torch."), tensor.itemsize)
    if not dtype.names:
        found: Array = tensor.numpy()
        return found
    bits = tensor.contiguous().view({1: torch.uint8, 2: torch.uint16}[tensor.itemsize])
    return bits.numpy().view(dtype)
