"""Statistics of every matrix's inputs, and the cost of rounding each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smolctl.config import ModelConfig
from smolctl.model.dynamic import dynamic_network
from smolctl.sources.arrays import as_tensor
from smolctl.sources.quantized.packed import PackedMatrix
from smolctl.sources.quantized.scaled import ScaledMatrix, StoredTensor
from smolctl.sources.shapes import tensor_name


@torch.inference_mode()
def input_squares(
    config: ModelConfig, tensors: Mapping[str, Tensor], windows: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Mean square of every matrix's input, per column: (columns,) under the matrix's name.

    Args:
        config: of the network.
        tensors: its weights in float32.
        windows: token ids (T + 1,) each.
    """
    network = dynamic_network(config, tensors)  # its head is a layer too
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            squares = inputs[0].flatten(0, -2).double().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    for name, module in network.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_pre_hook(add(tensor_name(name, config)))
    tokens = 0
    for window in windows:
        network(window[None, :-1])
        tokens += len(window) - 1
    return {name: (squares / tokens).float() for name, squares in sums.items()}


@dataclass(frozen=True)
class TensorCost:
    """The cost of rounding one tensor while all others stay exact."""

    name: str
    stored: str  # "int8", "int4"
    bytes: int
    output_error: float  # relative: RMS error of the output over RMS of the output
    kl: float | None = None  # nats per token if only this tensor is rounded; for the costliest only
    largest_input: float | None = None  # if inputs are rounded too, as in int8-dynamic
    median_input: float | None = None  # of the absolute values: the mean of the sequences' medians


def output_errors(
    tensors: Mapping[str, Tensor], items: Mapping[str, StoredTensor], squares: Mapping[str, Tensor]
) -> list[TensorCost]:
    """The relative error of every packed matrix's output, the costliest first.

    The columns of an input are treated as independent, because only their mean squares are known.
    """
    costs = []
    for name, item in items.items():
        if not isinstance(item, PackedMatrix) or name not in squares:  # tables are only looked up
            continue
        weight, weights = tensors[name], squares[name]
        missed = (as_tensor(item.dequantize()) - weight).square_()
        error = (missed @ weights).sum() / (weight.square() @ weights).sum().clamp(min=1e-30)
        costs.append(TensorCost(name, f"int{item.bits}", item.bytes, float(error.sqrt())))
    return sorted(costs, key=lambda cost: -cost.output_error)


@torch.inference_mode()
def dynamic_errors(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    items: Mapping[str, StoredTensor],
    activations: str,
    windows: Sequence[Tensor],
) -> list[TensorCost]:
    """The relative error of every layer of int8-dynamic on the source's own inputs, the costliest first.

    The first token of a sequence is excluded from the errors: its activations are the outliers, and a layer
    that is accurate for it may give zeros for all other tokens.

    Args:
        config: of the network.
        tensors: its weights in float32.
        items: the tensors of int8-dynamic.
        activations: "per-tensor" or "per-token".
        windows: token ids (T + 1,) each.
    """
    exact = dynamic_network(config, tensors)
    rounded = dynamic_network(config, items, activations)
    seen: dict[str, list[tuple[Tensor, ...]]] = {}  # by sequence: squared error, square, and inputs

    def watch(layer: nn.Module, found: list[tuple[Tensor, ...]]) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x, y = inputs[0].flatten(0, -2), output.flatten(0, -2)  # (T, columns), (T, rows)
            missed, total = (layer(x) - y)[1:].square().sum(), y[1:].square().sum()
            found.append((missed, total, x.abs().max(), x.abs().median()))

        return hook

    for name, module in exact.named_modules():
        if type(module) is nn.Linear:
            tensor = tensor_name(name, config)
            if isinstance(items[tensor], ScaledMatrix):
                layer = rounded.get_submodule(name)
                module.register_forward_hook(watch(layer, seen.setdefault(tensor, [])))
    for window in windows:
        exact(window[None, :-1])
    costs = []
    for name, found in seen.items():
        missed, total, largest, medians = torch.tensor(found, dtype=torch.float64).T
        size = items[name].bytes  # type: ignore[union-attr]
        error = float((missed.sum() / total.sum().clamp(min=1e-30)).sqrt())
        costs.append(TensorCost(name, "int8", size, error, None, float(largest.max()), float(medians.mean())))
    return sorted(costs, key=lambda cost: -cost.output_error)
