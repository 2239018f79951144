"""Folders as `quantize` writes them, of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolctl.config import ModelConfig
from smolctl.model.weights import initialize
from smolctl.quantization.build import build_items
from smolctl.quantization.folder import Origin, write_folder
from smolctl.quantization.quantize import QuantizeOptions, QuantizeReport, quantize
from smolctl.quantization.schemes import SchemeOptions, plan_quantization
from tests.support.kin import SCALING

ROPE = {"position_embedding": "rope", "residual_scale": 1.0}
SCALED = {"rope_scaling": SCALING}
WIDE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, **ROPE}
SHAPES: dict[str, dict[str, Any]] = {
    "learned": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
    "rope": WIDE,
    "odd": {"hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 10, **ROPE},
    "untied": {
        "hidden_size": 45,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 15,
        "tie_word_embeddings": False,
    },
    "scaled": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, **ROPE, **SCALED},
    "without rope": {**WIDE, "no_rope_layers": (1, 0)},
    "biases": {**WIDE, "qkv_bias": True},
    "norms of heads": {**WIDE, "head_dim": 24, "use_qk_norm": True},
}


def quantized_folder(folder: Path, scheme: str, factor: float = 1.0, **options: Any) -> Path:
    """A folder of one of the shapes.

    Args:
        folder: to be made; its name is that of the shape.
        scheme: as `quantize --to` takes it.
        factor: of the projections to keys and values.
        options: of the scheme.
    """
    values = {"vocab_size": 131, "intermediate_size": 70, "num_hidden_layers": 2, "initializer_range": 0.15}
    config = ModelConfig(**{**values, "max_position_embeddings": 1500, **SHAPES[folder.name]})
    state: dict[str, Tensor] = initialize(config, 3).requires_grad_(False).state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            tensor *= factor
        if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
            tensor += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    plan = plan_quantization(config, scheme, SchemeOptions(**options))
    write_folder(folder, config, plan, build_items(config, state, plan), None, Origin("test", "test"))
    return folder


def make_quantized(
    model: str = "runs/llama", scheme: str = "int8", out: str = "out", **options: Any
) -> QuantizeReport:
    """Quantize a model into a folder of the working directory, without measuring it."""
    asked = SchemeOptions(**options)
    return quantize(model, QuantizeOptions((scheme,), asked, Path(out), measure=False))
