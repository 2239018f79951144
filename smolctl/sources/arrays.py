"""A model's numbers as NumPy's arrays, and as PyTorch's tensors for those who compute with them there.

NumPy has no bfloat16 and no floats of 8 bits. An array of these has a structured type of one field, which
holds the bits and is named as PyTorch names the type: no operator of NumPy takes it for integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]


def type_named(name: str, size: int) -> np.dtype[Any]:
    """The type of an array that PyTorch calls `name`, of `size` bytes an item."""
    try:
        return np.dtype(name)
    except TypeError:
        return np.dtype([(name, f"u{size}")])


BFLOAT16 = type_named("bfloat16", 2)


def name_of(dtype: np.dtype[Any]) -> str:
    """What PyTorch calls a type: "float32", "bfloat16"."""
    return dtype.names[0] if dtype.names else dtype.name


def as_float32(array: Array) -> NDArray[np.float32]:
    """The values of an array of floats; one of float32 is returned as it is."""
    if array.dtype == BFLOAT16:
        bits = array.view(np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if array.dtype.names:
        narrow: Array = as_tensor(array).float().numpy()
        return narrow
    return array.astype(np.float32, copy=False)


def as_bfloat16(array: Array) -> Array:
    """The values of an array of floats rounded to bfloat16, those in the middle to the even one."""
    values = as_float32(array)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0  # adding may have made an infinity of it
    return rounded.view(BFLOAT16)


def as_tensor(array: Array) -> torch.Tensor:
    """The same memory as a tensor on the CPU."""
    import torch

    if not array.dtype.names:
        return torch.from_numpy(array)
    bits = torch.from_numpy(array.view(f"u{array.itemsize}"))
    return bits.view(getattr(torch, name_of(array.dtype)))


def as_array(tensor: torch.Tensor) -> Array:
    """The values of a tensor, in the same memory where it lies on the CPU."""
    import torch

    tensor = tensor.detach().cpu()
    dtype = type_named(str(tensor.dtype).removeprefix("torch."), tensor.itemsize)
    if not dtype.names:
        found: Array = tensor.numpy()
        return found
    bits = tensor.contiguous().view({1: torch.uint8, 2: torch.uint16}[tensor.itemsize])
    return bits.numpy().view(dtype)
