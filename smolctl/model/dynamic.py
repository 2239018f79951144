"""The network after PyTorch's `quantize_dynamic`: 8-bit weights, activations rounded to 8 bits as they come.

The linear layers multiply integers with integers. For that every input is rounded on the fly, with one scale
for the whole tensor: whatever the largest value is, the others get what is left of 128 steps. SmolLM2's
first token sends 3,169 into a down_proj whose other inputs stay below 2: they round to nothing. Per token,
every row has a scale of its own: the same kernel, given rows that were divided by their largest value.

A tied head is a linear layer here, and the token table looks its rows up in the head's integers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.ao.nn.quantized.dynamic as quantized
import torch.nn.functional as F
from torch import Tensor, nn

from smolctl.config import ModelConfig
from smolctl.model.network import Linear, RMSNorm, Transformer
from smolctl.sources.quantized.scaled import ScaledMatrix
from smolctl.sources.shapes import HEAD, TABLE

Part = Tensor | ScaledMatrix
SMALLEST = 1e-12  # divisor of a row of zeros


@contextmanager
def silence() -> Iterator[None]:
    """Hide what PyTorch says about `torch.ao.quantization` being replaced some day: it is there and works."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


class DynamicMLP(nn.Module):
    """SwiGLU through modules, so that each of them can be replaced."""

    gate_proj: Callable[[Tensor], Tensor]
    up_proj: Callable[[Tensor], Tensor]
    down_proj: Callable[[Tensor], Tensor]

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.add_module(name, mlp.get_submodule(name))

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        x = norm(x)
        activated = F.silu(self.gate_proj(x)).mul_(self.up_proj(x))
        return self.down_proj(activated)


class PackedTable(nn.Module):
    """Rows of a tied table, looked up in the head's integers. It has no state of its own."""

    def __init__(self, matrix: ScaledMatrix) -> None:
        super().__init__()
        self.values, self.scales = matrix.values, matrix.scales

    def forward(self, ids: Tensor) -> Tensor:
        scales = self.scales if self.scales.numel() == 1 else self.scales[ids].unsqueeze(-1)
        return self.values[ids].float() * scales


class PerTokenLinear(quantized.Linear):
    """PyTorch's dynamic layer with a scale for each row of its input, in all 8 bits.

    PyTorch keeps to 7 bits, because a CPU without VNNI adds pairs of products in 16 bits, which may not
    hold them. Rows divided by their largest value lie around the middle of the range: a pair overflows
    only where an outlier meets the largest weights. On SmolLM2-135M the eighth bit brings the KL from 0.15
    to 0.04.
    """

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST)
        weights = self._packed_params._packed_params
        out: Tensor = torch.ops.quantized.linear_dynamic(x / largest, weights, reduce_range=False)
        return out.mul_(largest)


class DynamicTransformer(Transformer):
    """A network in which the linear layers, the head among them, are modules of PyTorch's own kinds.

    Args:
        config: the shape.
        parts: every tensor under its Hugging Face name; a `ScaledMatrix` becomes a quantized layer.
        activations: "per-tensor", as PyTorch does it, or "per-token".
    """

    def __init__(
        self, config: ModelConfig, parts: Mapping[str, Part], activations: str = "per-tensor"
    ) -> None:
        with torch.device("meta"):
            super().__init__(config)
        layer = PerTokenLinear if activations == "per-token" else quantized.Linear
        for block in cast(list[nn.Module], list(self.model.layers)):
            block.mlp = DynamicMLP(cast(nn.Module, block.mlp))
        for name, module in list(self.named_modules()):
            part = parts.get(f"{name}.weight")
            if isinstance(module, Linear):
                self.set_submodule(name, _linear(parts[f"{name}.weight"], layer))
            elif isinstance(part, Tensor):
                cast(Any, module).weight = nn.Parameter(part.float(), requires_grad=False)
        if config.tie_word_embeddings:
            table = parts[TABLE]
            self.lm_head = cast(Any, _linear(table, layer))
            if isinstance(table, ScaledMatrix):
                self.set_submodule("model.embed_tokens", PackedTable(table))
        self.eval()

    def logits(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, cast(nn.Module, self.lm_head)(hidden))


def _linear(part: Part, layer: Callable[..., quantized.Linear]) -> nn.Module:
    rows, columns = part.shape
    if isinstance(part, Tensor):
        with torch.device("meta"):
            plain = nn.Linear(columns, rows, bias=False)
        plain.weight = nn.Parameter(part.float(), requires_grad=False)
        return plain
    with silence():
        packed = layer(columns, rows, bias_=False, dtype=torch.qint8)
        packed.set_weight_bias(_quantized_tensor(part), None)
    return packed


def _quantized_tensor(matrix: ScaledMatrix) -> Tensor:
    if matrix.scales.numel() == 1:
        return torch._make_per_tensor_quantized_tensor(matrix.values, matrix.scales.item(), 0)
    zeros = torch.zeros(len(matrix.scales), dtype=torch.long)
    return torch._make_per_channel_quantized_tensor(matrix.values, matrix.scales.double(), zeros, 0)


def quantize_dynamically(
    config: ModelConfig, tensors: Mapping[str, Tensor], kept: Collection[str] = (), per_row: bool = False
) -> dict[str, Part]:
    """Every tensor after PyTorch's `quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)`.

    Args:
        config: of the network.
        tensors: its weights in float32 under their Hugging Face names.
        kept: names of matrices that stay as they are; a tied table's is that of the head.
        per_row: a scale for each row of a matrix in place of one for all of it.
    """
    from torch.ao.quantization import (
        default_dynamic_qconfig,
        per_channel_dynamic_qconfig,
        quantize_dynamic,
    )

    network = DynamicTransformer(config, tensors)
    head = TABLE if config.tie_word_embeddings else HEAD
    names = {
        name: head if name == "lm_head" else f"{name}.weight"
        for name, module in network.named_modules()
        if type(module) is nn.Linear
    }
    qconfig = per_channel_dynamic_qconfig if per_row else default_dynamic_qconfig
    spec = {name: qconfig for name, tensor in names.items() if tensor not in kept}
    with silence():
        changed = quantize_dynamic(network, spec, dtype=torch.qint8, inplace=True)
        parts: dict[str, Part] = dict(tensors)
        for name in spec:
            matrix = changed.get_submodule(name).weight()
            parts[names[name]] = ScaledMatrix(matrix.int_repr(), _scales(matrix))
    return parts


def _scales(matrix: Tensor) -> Tensor:
    if matrix.qscheme() == torch.per_tensor_affine:
        return torch.tensor([matrix.q_scale()], dtype=torch.float32)
    return matrix.q_per_channel_scales().float()


def dynamic_state(network: DynamicTransformer) -> dict[str, Any]:
    """PyTorch's state of the network, as a `_quantized.ckpt` keeps it.

    Vectors are copied: one that is a view of a mapped file would take the whole file along.
    """
    with silence():
        state = network.state_dict()
    return {key: value.clone() if _is_plain(value) else value for key, value in state.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_quantized
