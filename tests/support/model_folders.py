"""Folders as transformers would save them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from smolctl.config import ModelConfig
from smolctl.model.weights import initialize
from smolctl.sources.huggingface.config import to_huggingface_config

FIELDS = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "position_embedding": "rope",
    "residual_scale": 1.0,
}


def llama_folder(folder: Path, **changes: object) -> Path:
    """A Hugging Face folder of a tiny Llama, as transformers would save it."""
    config = ModelConfig.model_validate(FIELDS | changes)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_huggingface_config(config)))
    state = initialize(config, seed=0).state_dict()
    save_file({name: tensor.numpy() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def other_architecture(folder: Path, **config: object) -> Path:
    """A folder of a model that this network is not: biases on q, and two kinds of layers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "starcoder2", **config}))
    tensors = {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,)}
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = (4, 4)
        tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = (4,)
    tensors["model.layers.2.mlp.up_proj.weight"] = (8, 4)
    save_file({n: np.zeros(s, np.float32) for n, s in tensors.items()}, folder / "model.safetensors")
    return folder
