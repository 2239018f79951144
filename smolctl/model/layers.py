"""The layers that the network consists of: matrices and norms.

Shapes: I inputs and O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from smolctl.model.functional import linear, rms_norm, rms_norm_linears

M = TypeVar("M", bound=nn.Module)


def uninitialized(kind: Callable[..., M], *sizes: int, **options: Any) -> M:
    """A layer without values, which `weights.py` initializes or loads.

    PyTorch's own initialization would take seconds for 135 million parameters and be discarded.
    """
    with torch.device("meta"):
        layer = kind(*sizes, **options)
    return layer.to_empty(device=torch.get_default_device())


def linear_layer(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    """A matrix (outputs, inputs) as the stock layer, so that tools that replace `nn.Linear` find it."""
    return uninitialized(nn.Linear, inputs, outputs, bias=bias)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is the stock one, so that its matmul may be fused with neighbouring operations.

    A layer that was replaced by PyTorch's `quantize_dynamic` or an adapter, or that has hooks, is called as a
    module.
    """
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is nn.Linear and not hooked


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """x (…, I) times a layer's matrix (O, I), plus its bias if it has one: (…, O)."""
    if not is_plain(layer):
        return cast(Tensor, layer(x))
    plain = cast(nn.Linear, layer)
    return with_bias(plain, linear(x, plain.weight))


def add_linear(sum: Tensor, layer: nn.Linear, x: Tensor, scale: float) -> Tensor:
    """sum (…, O) plus `scale` times a layer's output for x (…, I); fused with the matmul where possible."""
    if is_plain(layer) and scale == 1:
        return with_bias(layer, linear(x, layer.weight, sum))
    return torch.add(sum, apply_linear(layer, x), alpha=scale)


def with_bias(layer: nn.Linear, y: Tensor) -> Tensor:
    """y (…, O) plus the layer's bias (O,), if it has one."""
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) × weight, with the mean of squares over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def normed_linears(x: Tensor, norm: RMSNorm, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Each of the layers applied to the norm; with gradients, as one fused operation that saves less."""
    if torch.is_grad_enabled() and norm.weight.requires_grad and all(map(is_plain, layers)):
        products = rms_norm_linears(x, norm.weight, norm.eps, *(layer.weight for layer in layers))
        return tuple(map(with_bias, layers, products))
    normed = norm(x)
    return tuple(apply_linear(layer, normed) for layer in layers)
