"""What the inputs of every matrix look like, and what the rounding of each costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smolctl.config import ModelConfig
from smolctl.model.weights import from_state
from smolctl.quantization.folder import Item
from smolctl.sources.shapes import HEAD, TABLE


@torch.inference_mode()
def input_squares(
    config: ModelConfig, tensors: Mapping[str, Tensor], windows: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Mean square of every matrix's input, column by column: (columns,) under the matrix's name.

    Args:
        config: of the network.
        tensors: its weights in float32.
        windows: token ids (T + 1,) each.
    """
    network = from_state(config, dict(tensors), "calibration").eval()
    sums: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        squares = inputs.flatten(0, -2).double().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    def before(name: str) -> Any:
        return lambda _module, inputs: add(name, inputs[0])

    def gate(layer: str) -> Any:
        return lambda _module, _inputs, output: gates.__setitem__(layer, output)

    def up(layer: str) -> Any:
        # The network multiplies with down_proj's matrix itself: its input is made again here.
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            add(f"{layer}.down_proj.weight", torch.nn.functional.silu(gates.pop(layer)) * output)

        return hook

    for name, module in network.named_modules():
        layer = name.rpartition(".")[0]
        if isinstance(module, nn.Linear) and name.split(".")[-1] != "down_proj":
            module.register_forward_pre_hook(before(f"{name}.weight"))
        if name.endswith("gate_proj"):
            module.register_forward_hook(gate(layer))
        if name.endswith("up_proj"):
            module.register_forward_hook(up(layer))
    head = TABLE if config.tie_word_embeddings else HEAD
    network.model.norm.register_forward_hook(lambda _module, _inputs, output: add(head, output))
    tokens = 0
    for window in windows:
        network.model(window[None, :-1])
        tokens += len(window) - 1
    return {name: (squares / tokens).float() for name, squares in sums.items()}


@dataclass(frozen=True)
class TensorCost:
    """What the rounding of one tensor costs by itself."""

    name: str
    stored: str  # "int8", "int4"
    bytes: int
    output_error: float  # relative: RMS error of the product over RMS of the product, inputs independent
    kl: float | None = None  # nats a token when this tensor alone is rounded; only of the costliest


def output_errors(
    tensors: Mapping[str, Tensor], items: Mapping[str, Item], squares: Mapping[str, Tensor]
) -> list[TensorCost]:
    """The relative error of every packed matrix's product, the costliest first."""
    costs = []
    for name, item in items.items():
        if isinstance(item, Tensor) or name not in squares:
            continue
        weight, weights = tensors[name], squares[name]
        missed = (item.dequantize() - weight).square_()
        error = (missed @ weights).sum() / (weight.square() @ weights).sum().clamp(min=1e-30)
        bits = getattr(item, "bits", 8)
        costs.append(TensorCost(name, f"int{bits}", item.bytes, float(error.sqrt())))
    return sorted(costs, key=lambda cost: -cost.output_error)
