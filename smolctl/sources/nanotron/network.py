"""The network in a nanotron YAML, as fields of `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolctl.config import ModelConfig, RopeScaling
from smolctl.outside import fitting, shown
from smolctl.sources.huggingface.config import SILU
from smolctl.sources.nanotron.node import Node
from smolctl.sources.shapes import no_rope_layers

# Defaults of nanotron's LlamaConfig for missing keys (nanotron/config/models_config.py).
DEFAULTS: Mapping[str, Any] = {
    **{"vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "max_position_embeddings": 2_048, "rms_norm_eps": 1e-6},
    **{"rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": False},
    **{"initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
}
# Fields of `ModelConfig` that are derived from keys with other names or values.
DERIVED_FIELDS = ("rope_scaling", "no_rope_layers", "qkv_bias", "use_qk_norm")
MODEL_FIELDS = tuple(field for field in ModelConfig.model_fields if field not in DERIVED_FIELDS)
# Qwen2's network without its biases and sliding windows is a Llama.
NETWORKS = ("is_llama_config", "is_qwen2_config")
# Keys of a model that become `DERIVED_FIELDS`.
RENAMED_KEYS = ("no_rope_layer", "rope_scaling", "attention_bias")
# Keys of a model that affect only how it is computed: fused kernels, caches, logs.
IMPLEMENTATION_KEYS = (
    *("pretraining_tp", "use_cache", "_attn_implementation", "_fused_rms_norm", "_fused_rotary_emb"),
    *("_use_qkv_packed", "_use_doc_masking", "log_attn_probs", "ring_attn_heads_k_stride"),
    *("z_loss_enabled", "z_loss_coefficient", "rope_interleaved"),
)
# Keys that change the computation of a network but not its parameters.
SAME_PARAMETERS = (
    *("sliding_window_size", "window_size", "rope_scaling"),
    *("flex_attention_mask", "rope_seq_len_interpolation_factor"),
)


def unsupported_feature(model: Mapping[str, Any]) -> str:
    """The first unsupported feature of a `model_config`; "" if there is none."""
    others = [key for key in _named(model) if key not in NETWORKS]
    if others:
        return f"a nanotron model with {others[0]} is not supported, only Llama's"
    if not is_llama(model):
        return "a nanotron model with is_llama_config: false is not supported, only Llama's"
    if keys := not_understood(model):
        said = ", ".join(f"{key} {shown(model[key])}" for key in keys[:5])
        return f"nanotron's {said} {'is' if len(keys) == 1 else 'are'} not supported"
    activation = model.get("hidden_act", SILU[0])
    return "" if activation in SILU else f"hidden_act {activation} is not supported, only silu"


def not_understood(model: Mapping[str, Any]) -> list[str]:
    """Keys of a model that are switched on, but that smolctl's Llama does not support."""
    known = {*MODEL_FIELDS, *NETWORKS, *IMPLEMENTATION_KEYS, *RENAMED_KEYS}
    if model.get("rope_scaling") and _rope_scaling(model) is None:
        known.remove("rope_scaling")
    if model.get("no_rope_layer") or not model.get("is_qwen2_config"):  # nanotron's Llama has no biases
        known.remove("attention_bias")
    return [key for key, value in model.items() if key not in known and value not in (None, False, 0, "none")]


def is_llama(model: Mapping[str, Any]) -> bool:
    """Whether a model may be a Llama; without an explicit key, nanotron assumes Llama."""
    named = _named(model)
    return all(key in NETWORKS for key in named) and bool(named or model.get("is_llama_config") is not False)


def _named(model: Mapping[str, Any]) -> list[str]:
    """The kinds of network that a model names: `is_llama_config` and similar keys."""
    return [key for key, value in model.items() if key.startswith("is_") and value]


def model_fields(node: Node) -> dict[str, Any]:
    """The fields of `ModelConfig`, including nanotron's defaults.

    Raises:
        InputError: a value is of the wrong type.
    """
    given = node.get("model.model_config")
    fields = {**DEFAULTS, **{key: value for key, value in given.items() if key in MODEL_FIELDS}}
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields["hidden_act"] = SILU[0]  # others are refused, and have the same parameters
    interval = node.number("model.model_config.no_rope_layer", 0)
    if interval > 0:
        layers = node.number("model.model_config.num_hidden_layers", fields["num_hidden_layers"])
        fields["no_rope_layers"] = no_rope_layers(layers, interval)
    bias = node.flag("model.model_config.attention_bias")
    fields |= {"rope_scaling": _rope_scaling(given), "qkv_bias": bias}
    std = node.get("model.init_method.std")
    if std is not None:
        fields["initializer_range"] = std
    return fields | {"position_embedding": "rope", "residual_scale": 1.0}


def _rope_scaling(model: Mapping[str, Any]) -> RopeScaling | None:
    """Llama 3's RoPE scaling; None if there is none, or a different one."""
    given = model.get("rope_scaling")
    return fitting(RopeScaling, given) if isinstance(given, Mapping) and given.get("rope_type") else None


def is_tied(node: Node) -> bool:
    """Whether the head is tied to the token table."""
    return node.flag("model.model_config.tie_word_embeddings", DEFAULTS["tie_word_embeddings"])
