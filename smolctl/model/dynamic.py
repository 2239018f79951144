"""The network after PyTorch's `quantize_dynamic`: 8-bit weights, and activations quantized at run time.

Each input has one scale for the whole tensor, which is set by its largest value. SmolLM2's first token sends
3,169 into a down_proj whose other inputs stay below 2, so these are rounded to zero. With scales per token,
every row has its own.

A CPU without VNNI (such as one with AVX2) adds pairs of byte products in 16 bits, and saturates sums that do
not fit. With 7-bit inputs all sums fit, 2 × 127 × 128 < 2¹⁵, so every CPU computes the same. PyTorch's own
layers always use 7-bit inputs, whatever the weights are, and so does `PerTokenLinear`.

A tied head is a linear layer here, and the token table reads its rows from the head's integers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.ao.nn.quantized.dynamic as quantized
from torch import Tensor, nn

from smolctl.config import ModelConfig
from smolctl.model.network import Transformer
from smolctl.sources.arrays import as_tensor
from smolctl.sources.quantized.scaled import ScaledMatrix, StoredTensor, dense
from smolctl.sources.shapes import tensor_name

SMALLEST = 1e-12  # divisor for a row of zeros


# Hides PyTorch's warning that `torch.ao.quantization` will be replaced; it still works.
silence = partial(warnings.catch_warnings, action="ignore")


class PackedTable(nn.Module):
    """Rows of a tied table, read from the head's integers. It has no state of its own."""

    def __init__(self, matrix: ScaledMatrix) -> None:
        super().__init__()
        self.values, self.scales = as_tensor(matrix.values), as_tensor(matrix.scales)

    def forward(self, ids: Tensor) -> Tensor:
        scales = self.scales if self.scales.numel() == 1 else self.scales[ids].unsqueeze(-1)
        return self.values[ids].float() * scales


class PerTokenLinear(quantized.Linear):
    """PyTorch's dynamic layer with a scale for each row of its input, and two 7-bit digits per value.

    A row divided by `unit` has a maximum of the largest digit, 63. Its rounded values are the first digits,
    and the rounding errors, times 126, are the second ones. Both are rows of the same matmul, so the matrix
    is read from memory once. An additional row contains the smallest and the largest digit, so that PyTorch,
    which derives its scale from the range of its input, chooses 1.

    Measured on SmolLM2-135M-Instruct with a scale for each matrix row (KL to the source in nats per token on
    1,536 tokens; tokens per second on one core of a Zen 4, for decoding and for a prompt):

    | activations | KL with VNNI | KL on AVX2 | decode | prompt |
    |---|---|---|---|---|
    | not rounded, float32 | 0.005 | 0.005 | 17 | 407 |
    | 8 bits, saturating | 0.043 | 0.379 | 41 | 887 |
    | 8 bits in qnnpack | 0.043 | 0.041 | 22 | 184 |
    | 8 bits, weights in 7 bits | 0.058 | 0.057 | 41 | 911 |
    | 7 bits | 0.154 | 0.151 | 41 | 924 |
    | two digits of 7 bits | 0.005 | 0.005 | 27 | 502 |
    """

    added: Tensor | None = None  # the bias, which is also in the packed weights

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)  # type: ignore[no-untyped-call]
        # qnnpack, PyTorch's kernels on ARM, always uses 8 bits, and accumulates in 32.
        self.largest_digit = 127 if torch.backends.quantized.engine == "qnnpack" else 63

    def set_weight_bias(self, w: Tensor, b: Tensor | None) -> None:
        super().set_weight_bias(w, b)
        self.added = b

    def forward(self, x: Tensor) -> Tensor:
        most, rows = self.largest_digit, x.flatten(0, -2)  # (N, columns)
        unit = rows.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST).div_(most)
        values = rows / unit
        first = values.round()
        extremes = torch.zeros_like(rows[:1])
        extremes[0, 0], extremes[0, -1] = -most - 1, most
        digits = torch.cat((first, values.sub_(first).mul_(2 * most), extremes))  # (2 N + 1, columns)
        weights = self._packed_params._packed_params
        sums: Tensor = torch.ops.quantized.linear_dynamic(digits, weights, reduce_range=most == 63)
        if self.added is not None:  # PyTorch added the bias to both digits
            sums -= self.added
        high, low = sums[:-1].chunk(2)
        total = high.add_(low, alpha=0.5 / most).mul_(unit)
        if self.added is not None:
            total += self.added
        return total.view(*x.shape[:-1], -1)


def dynamic_network(
    config: ModelConfig, stored: Mapping[str, Tensor | StoredTensor], activations: str = "per-tensor"
) -> Transformer:
    """A network whose linear layers, including the head, are PyTorch's quantized or plain layers.

    Args:
        config: the shape.
        stored: every tensor under its Hugging Face name; a `ScaledMatrix` becomes a quantized layer.
        activations: "per-tensor", as in PyTorch, or "per-token".
    """
    layer = PerTokenLinear if activations == "per-token" else quantized.Linear
    with torch.device("meta"):
        network = Transformer(config)
        if config.tie_word_embeddings:
            network.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    for name, module in list(network.named_modules()):
        matrix, vector = stored.get(tensor_name(name, config)), stored.get(f"{name}.bias")
        bias = None if vector is None else _floats(vector)
        if isinstance(matrix, ScaledMatrix):
            made = PackedTable(matrix) if isinstance(module, nn.Embedding) else _packed(matrix, bias, layer)
            network.set_submodule(name, made)
        elif matrix is not None:
            cast(Any, module).weight = nn.Parameter(_floats(matrix), requires_grad=False)
            if bias is not None:
                cast(Any, module).bias = nn.Parameter(bias, requires_grad=False)
    return network.eval()


def _floats(stored: Tensor | StoredTensor) -> Tensor:
    return (stored if isinstance(stored, Tensor) else as_tensor(dense(stored))).float()


def _packed(matrix: ScaledMatrix, bias: Tensor | None, layer: Callable[..., quantized.Linear]) -> nn.Module:
    rows, columns = matrix.shape
    with silence():
        packed = layer(columns, rows, bias_=bias is not None, dtype=torch.qint8)
        packed.set_weight_bias(matrix.quantized(), bias)
    return packed


def quantize_dynamically(
    config: ModelConfig, tensors: Mapping[str, Tensor], kept: Collection[str] = (), per_row: bool = False
) -> dict[str, Tensor | ScaledMatrix]:
    """Every tensor after PyTorch's `quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)`.

    Args:
        config: of the network.
        tensors: its weights in float32 under their Hugging Face names.
        kept: names of matrices that are not quantized; a tied table is named by its head.
        per_row: use a scale for each row of a matrix instead of one for the matrix.
    """
    from torch.ao.quantization import (
        default_dynamic_qconfig,
        per_channel_dynamic_qconfig,
        quantize_dynamic,
    )

    network = dynamic_network(config, tensors)
    names = {
        name: tensor_name(name, config)
        for name, module in network.named_modules()
        if type(module) is nn.Linear
    }
    qconfig = per_channel_dynamic_qconfig if per_row else default_dynamic_qconfig
    spec = {name: qconfig for name, tensor in names.items() if tensor not in kept}
    with silence():
        changed = quantize_dynamic(network, spec, dtype=torch.qint8, inplace=True)
        made = {names[name]: ScaledMatrix.of(changed.get_submodule(name).weight()) for name in spec}
    return {**tensors, **made}


def dynamic_state(network: Transformer) -> dict[str, Any]:
    """PyTorch's state of the network, as stored in a `_quantized.ckpt`.

    Vectors are copied, because a view of a mapped file would be saved with the whole file.
    """
    with silence():
        state = network.state_dict()
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
