"""Hugging Face's config.json, read into a `ModelConfig` and written from one.

Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and transformers 5
(`rope_parameters`, `dtype`). What the network cannot compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import TypedDict

from smolctl.config import ModelConfig
from smolctl.config.load import resolve_model_config
from smolctl.outside import checked, shown

# What `transformers.LlamaConfig` assumes for a key that config.json leaves out.
LLAMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4_096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2_048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
DEFAULT_ROPE_THETA = 10_000.0
ROPE = ("rope_parameters", "rope_scaling")  # transformers 5's key and 4's
# What `push` calls a network with learned positions or scaled branches, and what its config class assumes.
OWN_TYPE, OWN_ARCHITECTURE = "smolctl", "SmolctlForCausalLM"
OWN_DEFAULTS = {"position_embedding": "learned", "residual_scale": 1.0}
OUR_ARCHITECTURES = ("llamaforcausallm", OWN_ARCHITECTURE.lower())
# Features that are off when the key is absent, null, false or zero.
OFF_SWITCHES = (
    *("attention_bias", "mlp_bias", "quantization_config", "quantization", "sliding_window"),
    "rope_interleaved",
)
SILU = ("silu", "swish")  # two names of one function


class _Declared(TypedDict, total=False):
    """What a config.json says of itself, beside the fields of `ModelConfig`."""

    architectures: list[str] | None
    model_type: str | None
    hidden_act: str | None
    rope_parameters: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None


def from_huggingface_config(values: Mapping[str, Any], origin: str) -> tuple[ModelConfig | None, str]:
    """The network that a config.json describes, or why this toolkit's network is another one.

    Args:
        values: the parsed config.json.
        origin: what to call it in an error.

    Returns:
        The config and "", or None and the feature that is not supported.

    Raises:
        InputError: a value is wrong in itself (negative size, heads that do not divide, ...).
    """
    checked(_Declared, values, origin)
    reason = unsupported_feature(values)
    return (None, reason) if reason else (_network(values, origin), "")


def counted_config(values: Mapping[str, Any], origin: str) -> ModelConfig | None:
    """A network with the parameters and the costs of one that cannot be run; None when there is none.

    How positions are rotated, which function the gate has, how the weights are packed, and whether the head
    tells the next token or a class of texts, changes nothing in the layers of a Llama.
    """
    listed = values.get("architectures") or ("Llama",)
    is_llama = values.get("model_type") in ("llama", OWN_TYPE) and str(listed[0]).startswith(
        ("Llama", "Smolctl")
    )
    known = str(listed[0]).endswith(("ForCausalLM", "Model", "ForSequenceClassification", "Llama"))
    if not (is_llama and known) or values.get("attention_bias") or values.get("mlp_bias"):
        return None
    return _network({**values, "hidden_act": SILU[0]}, origin)


def _network(values: Mapping[str, Any], origin: str) -> ModelConfig:
    fields = {key: values.get(key, default) for key, default in LLAMA_DEFAULTS.items()}
    fields["num_key_value_heads"] = values.get("num_key_value_heads") or fields["num_attention_heads"]
    fields["head_dim"] = values.get("head_dim") or 0
    fields["rope_theta"] = _rope(values).get("rope_theta") or values.get("rope_theta") or DEFAULT_ROPE_THETA
    fields["attention_dropout"] = fields["attention_dropout"] or 0.0
    ours = {"position_embedding": "rope", "residual_scale": 1.0}
    if values.get("model_type") == OWN_TYPE:
        ours = {key: values.get(key, default) for key, default in OWN_DEFAULTS.items()}
    if fields["hidden_act"] in SILU:
        fields["hidden_act"] = SILU[0]
    return resolve_model_config(fields | ours, origin)


def assumed_keys(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Sizes that a config.json leaves out, so that Llama's defaults are assumed."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return tuple(
        f"{key} is not given: Llama's {LLAMA_DEFAULTS[key]:,} is assumed"
        for key in sizes
        if key not in values
    )


def unsupported_feature(values: Mapping[str, Any]) -> str:
    """The first feature of a config.json that this network does not have; "" when there is none."""
    model_type, architectures = values.get("model_type"), values.get("architectures") or ()
    if model_type not in ("llama", OWN_TYPE):
        named = f"model_type {model_type}" if model_type else "a config.json without model_type"
        return f"{named} is not supported, only llama"
    if architectures and not any(str(name).lower() in OUR_ARCHITECTURES for name in architectures):
        return f"architecture {architectures[0]} is not supported, only LlamaForCausalLM"
    activation = values.get("hidden_act", "silu")
    if activation not in SILU:
        return f"hidden_act {activation} is not supported, only silu"
    for key in OFF_SWITCHES:
        if values.get(key):
            return f"{key} is not supported{_detail(values[key])}"
    return _unsupported_rope(values)


def _unsupported_rope(values: Mapping[str, Any]) -> str:
    given = [rope for key in ROPE if (rope := values.get(key))]
    if len(given) == 2 and _meaning(given[0], values) != _meaning(given[1], values):
        return "rope_scaling and rope_parameters contradict each other: that is not supported"
    rope = _rope(values)
    by_layer = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if by_layer:
        return f"rope_parameters of their own for {by_layer[0]} are not supported"
    kind = _rope_kind(rope)
    if kind != "default":
        return f"rope scaling {kind} is not supported"
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        return f"partial_rotary_factor {partial} is not supported"
    return ""


def _rope_kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type") or rope.get("type") or "default"


def _meaning(rope: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What one of the two spellings says, with what it leaves out: where both are there, transformers takes
    `rope_scaling`, and its base from the top level."""
    rest = {key: value for key, value in rope.items() if key not in ("type", "rope_type", "rope_theta")}
    theta = rope.get("rope_theta") or values.get("rope_theta") or DEFAULT_ROPE_THETA
    return {**rest, "rope_type": _rope_kind(rope), "rope_theta": theta}


def _rope(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """v5 `rope_parameters`, or v4 `rope_scaling`; empty when neither is there."""
    for key in ROPE:
        if rope := values.get(key):
            return dict(rope)
    return {}


def _detail(value: Any) -> str:
    """How a switched-on feature is described: `quant_method bitsandbytes`, `4096`, or nothing."""
    if isinstance(value, Mapping):
        method = value.get("quant_method")
        return f" ({method if isinstance(method, str) else shown(method)})" if method else ""
    return "" if value is True else f" ({shown(value)})"


def to_huggingface_config(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a network, in both spellings, for old readers and new.

    A Llama-shaped one is a `LlamaForCausalLM`. One with learned positions or scaled residual branches names
    the two Python files that it needs beside it (`transformers_code/`).
    """
    common: dict[str, Any] = {
        **config.model_dump(mode="json", exclude={"position_embedding", "residual_scale"}),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.is_llama:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common}
    return {
        "architectures": [OWN_ARCHITECTURE],
        "model_type": OWN_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_smolctl.SmolctlConfig",
            "AutoModel": "modeling_smolctl.SmolctlModel",
            "AutoModelForCausalLM": f"modeling_smolctl.{OWN_ARCHITECTURE}",
        },
        "position_embedding": config.position_embedding,
        "residual_scale": config.residual_scale,
        **common,
    }
