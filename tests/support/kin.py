"""Tiny models of every kind that the network computes, with weights that make each part of it count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from smolctl.config import ModelConfig
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize

TINY: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large, so that a mistake shows in the logits
    "position_embedding": "rope",
    "residual_scale": 1.0,
    "rope_theta": 5_000.0,
}
# A context of 64 was learned: of these eight rotations some are fast, some slow, and some between.
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "scaled llama": {"rope_scaling": SCALING, "tie_word_embeddings": False},
    "smollm3": {"no_rope_layers": (1, 1, 1, 0), "rope_theta": 2_000_000.0},
    "qwen2": {"qkv_bias": True, "rms_norm_eps": 1e-6},
    "qwen3": {"use_qk_norm": True, "head_dim": 32, "rope_theta": 1_000_000.0},
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "scaled llama": "LlamaForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def kin_config(kind: str, **changes: Any) -> ModelConfig:
    """The tiny model of one of `KINDS`."""
    return ModelConfig(**{**TINY, **KINDS[kind], **changes})


def kin_network(config: ModelConfig, seed: int = 1) -> Transformer:
    """A network whose norms are not one and whose biases are not zero."""
    network = initialize(config, seed).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return network
