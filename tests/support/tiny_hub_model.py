"""The config of the model that tests put on the loopback Hub."""

from __future__ import annotations

import json

from smolctl.config import ModelConfig
from smolctl.sources.huggingface.config import to_huggingface_config

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    position_embedding="rope",
    residual_scale=1.0,
)
CONFIG_JSON = json.dumps(to_huggingface_config(CONFIG)).encode()
