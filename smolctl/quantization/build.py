"""Converts a source's tensors to the form that a plan stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from smolctl.config import ModelConfig
from smolctl.model.dynamic import quantize_dynamically
from smolctl.model.weights import finite_tensors
from smolctl.quantization.rounding import quantize_matrix
from smolctl.quantization.schemes import QuantizationPlan, wider
from smolctl.sources.arrays import as_array, as_tensor
from smolctl.sources.base import ModelSource
from smolctl.sources.quantized.packed import BLOCK
from smolctl.sources.quantized.range import holds
from smolctl.sources.quantized.scaled import StoredTensor, dense
from smolctl.sources.quantized_folder import DYNAMIC
from smolctl.sources.shapes import check_state


def read_tensors(source: ModelSource) -> dict[str, Tensor]:
    """Every tensor in float32, without a tied head; all of them are finite.

    Raises:
        InputError: the weights cannot be read, do not fit the config, or contain NaN or infinite values.
    """
    state = check_state(source.require_config(), dict(finite_tensors(source)), source.id)
    return {name: tensor.detach().float().cpu() for name, tensor in state.items()}


def widened(
    plan: QuantizationPlan, tensors: Mapping[str, Tensor]
) -> tuple[QuantizationPlan, tuple[str, ...]]:
    """Change the storage of each matrix whose values exceed its range: the new plan, and a line for each
    change.

    Args:
        plan: as requested.
        tensors: in float32 under their Hugging Face names.
    """
    if plan.scheme == DYNAMIC:  # its scales are float32
        return plan, ()
    entries, lines = [], []
    for entry in plan.tensors:
        tensor = tensors[entry.name]
        fitting = next(one for one in wider(entry) if holds(one.label, tensor, one.group or BLOCK))
        if fitting is not entry:
            lines.append(
                f"{entry.name} is stored as {fitting.label}: its values, up to "
                f"{float(tensor.abs().max()):.2g}, are outside the range of {entry.label}"
            )
        entries.append(fitting)
    return dataclasses.replace(plan, tensors=tuple(entries)), tuple(lines)


def build_items(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    plan: QuantizationPlan,
    importance: Mapping[str, Tensor] | None = None,
) -> dict[str, StoredTensor]:
    """Every tensor as the plan stores it.

    Args:
        config: of the network.
        tensors: in float32 under their Hugging Face names.
        plan: of a scheme that becomes a folder, after `widened`.
        importance: mean square of every matrix's input, (columns,), for the search for scales.
    """
    if plan.scheme == DYNAMIC:
        kept = {tensor.name for tensor in plan.tensors if not tensor.packed}
        parts = quantize_dynamically(config, tensors, kept, plan.options.per_row)
        named = ((entry.name, parts[entry.name]) for entry in plan.tensors)
        return {name: as_array(one) if isinstance(one, Tensor) else one for name, one in named}
    items: dict[str, StoredTensor] = {}
    for entry in plan.tensors:
        tensor = tensors[entry.name]
        if entry.packed and entry.group is not None:
            weights = importance.get(entry.name) if importance is not None else None
            items[entry.name] = quantize_matrix(tensor, entry.bits, entry.group, weights)
        elif entry.bits == 16:
            items[entry.name] = as_array(tensor.bfloat16())
        else:
            items[entry.name] = as_array(_smallest(tensor) if tensor.dim() > 1 else tensor)
    return items


def _smallest(tensor: Tensor) -> Tensor:
    """A matrix that is not quantized: in bfloat16 if that represents every value exactly, else in float32."""
    short = tensor.bfloat16()
    return short if torch.equal(short.float(), tensor) else tensor


def dequantized(items: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The items as tensors in float32."""
    return {name: as_tensor(dense(item)) for name, item in items.items()}
