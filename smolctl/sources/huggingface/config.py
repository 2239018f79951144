"""Hugging Face's config.json, read into a `ModelConfig` and written from one.

Both key styles are read: transformers 4's (`rope_theta`, `rope_scaling`, `torch_dtype`) and transformers 5's
(`rope_parameters`, `dtype`). Features that the network does not have are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from smolctl.config import ModelConfig, RopeScaling
from smolctl.config.load import resolve_model_config
from smolctl.outside import checked, fitting, shown
from smolctl.sources.shapes import no_rope_layers

# Defaults of transformers' config classes for keys that config.json omits.
LLAMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4_096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2_048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
QWEN_DEFAULTS = {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "bos_token_id": None,
    "eos_token_id": None,
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE = ("rope_parameters", "rope_scaling")  # transformers 5's key and 4's
CONTEXT = "max_position_embeddings"
# The model type with which `push` names a network with learned positions or scaled branches, and the defaults
# of its config class.
OWN_TYPE, OWN_ARCHITECTURE = "smolctl", "SmolctlForCausalLM"
OWN_DEFAULTS = {"position_embedding": "learned", "residual_scale": 1.0}
# The supported model types, with the class and the defaults of each in transformers.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    OWN_TYPE: OWN_ARCHITECTURE,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4_096,
    },
    "smollm3": {
        "vocab_size": 128_256,
        "hidden_size": 2_048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "pad_token_id": 128_004,
        "rope_theta": 2_000_000.0,
        "no_rope_layer_interval": 4,
    },
    "qwen2": {**QWEN_DEFAULTS, "sliding_window": 4_096},
    "qwen3": {**QWEN_DEFAULTS, "sliding_window": 4_096, "head_dim": 128},
}
# Features that are off if the key is missing, null, false or zero.
OFF_SWITCHES = (
    *("attention_bias", "mlp_bias", "quantization_config", "quantization"),
    *("rope_interleaved", "use_mrope"),
)
# Fields of `ModelConfig` that not every class of transformers has: two are smolctl's own, one is SmolLM3's,
# and two are implied by the class.
NOT_WRITTEN = {"position_embedding", "residual_scale", "no_rope_layers", "qkv_bias", "use_qk_norm"}
SILU = ("silu", "swish")  # two names of the same function


class _Declared(TypedDict, total=False):
    """The keys of a config.json that are read in addition to the fields of `ModelConfig`."""

    architectures: list[str] | None
    model_type: str | None
    hidden_act: str | None
    rope_parameters: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None


class _SupportedKeys(TypedDict, total=False):
    """Further keys that are read if `model_type` is one of `ARCHITECTURES`."""

    num_hidden_layers: int
    head_dim: Annotated[int, Field(gt=0)] | None
    max_position_embeddings: int
    sliding_window: int | None
    layer_types: list[str] | None
    no_rope_layers: list[int] | None
    no_rope_layer_interval: Annotated[int, Field(gt=0)]


def from_huggingface_config(values: Mapping[str, Any], origin: str) -> tuple[ModelConfig | None, str]:
    """The network that a config.json describes, or the reason why smolctl's network cannot represent it.

    Args:
        values: the parsed config.json.
        origin: name of the file in an error.

    Returns:
        The config and "", or None and the unsupported feature.

    Raises:
        InputError: a value is invalid (negative size, heads that do not divide, ...).
    """
    checked(_Declared, values, origin)
    if values.get("model_type") in ARCHITECTURES:
        checked(_SupportedKeys, values, origin)
    reason = unsupported_feature(values)
    return (None, reason) if reason else (_network(values, origin), "")


def counted_config(values: Mapping[str, Any], origin: str) -> ModelConfig | None:
    """A network with the parameters and costs of one that cannot be run; None if there is none.

    The rotation of positions, the gate's activation, the packing of weights, and whether the head predicts a
    token or a class do not change the parameters of a Llama-like model's layers.
    """
    kind = ARCHITECTURES.get(str(values.get("model_type")), "").removesuffix("ForCausalLM")
    listed = str((values.get("architectures") or (kind,))[0])
    known = listed.endswith(("ForCausalLM", "Model", "ForSequenceClassification")) or listed == kind
    if not (kind and listed.startswith(kind) and known):
        return None
    if values.get("attention_bias") or values.get("mlp_bias"):
        return None
    return _network({**values, "hidden_act": SILU[0]}, origin)


def _network(values: Mapping[str, Any], origin: str) -> ModelConfig:
    kind, rope = values["model_type"], _rope(values)
    fields = {key: _value(values, key) for key in LLAMA_DEFAULTS}
    null = {
        "num_key_value_heads": fields["num_attention_heads"],
        "head_dim": 0,
        "attention_dropout": 0.0,
    }
    fields |= {key: value for key, value in null.items() if fields[key] is None}
    fields["rope_theta"] = _rope_theta(rope, values)
    fields["rope_scaling"] = _rope_scaling(values)
    if kind == "smollm3":
        fields["no_rope_layers"] = _no_rope_layers(values)
    fields |= {"qkv_bias": kind == "qwen2", "use_qk_norm": kind == "qwen3"}
    ours = {"position_embedding": "rope", "residual_scale": 1.0}
    if kind == OWN_TYPE:
        ours = {key: values.get(key, default) for key, default in OWN_DEFAULTS.items()}
    if fields["hidden_act"] in SILU:
        fields["hidden_act"] = SILU[0]
    return resolve_model_config(fields | ours, origin)


def _value(values: Mapping[str, Any], key: str) -> Any:
    """The value in a config.json, or the default of its model type in transformers."""
    return values.get(key, {**LLAMA_DEFAULTS, **DEFAULTS.get(str(values.get("model_type")), {})}.get(key))


def _rope_scaling(values: Mapping[str, Any]) -> RopeScaling | None:
    """Llama 3's scaling; None if there is none, or if its values are missing or invalid."""
    rope = _rope(values)
    if _rope_kind(rope) != "llama3":
        return None
    given = {"rope_type": "llama3", f"original_{CONTEXT}": _value(values, CONTEXT), **rope}
    return fitting(RopeScaling, {key: one for key, one in given.items() if key in RopeScaling.model_fields})


def _no_rope_layers(values: Mapping[str, Any]) -> list[int]:
    """Whether each layer has RoPE: from a list, which may be too long, or all except every n-th layer."""
    layers = _value(values, "num_hidden_layers")
    given = values.get("no_rope_layers")
    if given is not None:
        return list(given[:layers])
    return no_rope_layers(layers, _value(values, "no_rope_layer_interval"))


def assumed_keys(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Sizes missing in a config.json of a supported type, for which the type's defaults are assumed."""
    if values.get("model_type") not in ARCHITECTURES:
        return ()
    return tuple(assumption(key, _value(values, key)) for key in SIZES if key not in values)


def assumption(key: str, value: int) -> str:
    """The message about a size missing in a config.json."""
    return f"{key} is not given: {value:,} is assumed, as by transformers"


def unsupported_feature(values: Mapping[str, Any]) -> str:
    """The first unsupported feature of a config.json; "" if there is none."""
    model_type, architectures = values.get("model_type"), values.get("architectures") or ()
    if model_type not in ARCHITECTURES:
        named = f"model_type {model_type}" if model_type else "a config.json without model_type"
        return (
            f"{named} is not supported, only {', '.join(kind for kind in ARCHITECTURES if kind != OWN_TYPE)}"
        )
    ours = ARCHITECTURES[model_type]
    if architectures and not any(str(name).lower() == ours.lower() for name in architectures):
        return f"architecture {architectures[0]} is not supported, only {ours}"
    activation = values.get("hidden_act", "silu")
    if activation not in SILU:
        return f"hidden_act {activation} is not supported, only silu"
    for key in OFF_SWITCHES:
        if values.get(key):
            return f"{key} is not supported{_detail(values[key])}"
    return _unsupported_window(values) or _unsupported_rope(values)


def _unsupported_window(values: Mapping[str, Any]) -> str:
    """Attention that does not reach the first token; a window as long as the context does."""
    for kind in values.get("layer_types") or ():
        if kind != "full_attention":
            return f"layer_types {kind} is not supported"
    window = _value(values, "sliding_window")
    if values["model_type"].startswith(("qwen", "smollm3")) and not values.get("use_sliding_window"):
        return ""
    reaches_all = not window or window >= _value(values, CONTEXT)
    return "" if reaches_all else f"sliding_window is not supported ({window})"


def _unsupported_rope(values: Mapping[str, Any]) -> str:
    given = [rope for key in ROPE if (rope := values.get(key))]
    if len(given) == 2 and _meaning(given[0], values) != _meaning(given[1], values):
        return "rope_scaling and rope_parameters contradict each other: that is not supported"
    rope = _rope(values)
    by_layer = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if by_layer:
        return f"separate rope_parameters for {by_layer[0]} are not supported"
    kind = _rope_kind(rope)
    if kind not in ("default", "llama3"):
        return f"rope scaling {kind} is not supported"
    if kind == "llama3" and _rope_scaling(values) is None:
        return "rope scaling llama3 is not supported with missing or contradictory values"
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        return f"partial_rotary_factor {partial} is not supported"
    return ""


def _rope_kind(rope: Mapping[str, Any]) -> Any:
    named = [kind for key in ("rope_type", "type") if (kind := rope.get(key)) is not None]
    return named[0] if named else "default"


def _meaning(rope: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """One of the two key styles with its defaults: if both are there, transformers uses `rope_scaling`,
    with its base from the top level.
    """
    rest = {key: value for key, value in rope.items() if key not in ("type", "rope_type", "rope_theta")}
    return {**rest, "rope_type": _rope_kind(rope), "rope_theta": _rope_theta(rope, values)}


def _rope_theta(rope: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """The base in `rope_parameters`, else at the top level; 0 is a value too, and refused later."""
    theta = rope.get("rope_theta")
    return _value(values, "rope_theta") if theta is None else theta


def _rope(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """v5 `rope_parameters`, or v4 `rope_scaling`; empty if neither is there."""
    for key in ROPE:
        if rope := values.get(key):
            return dict(rope)
    return {}


def _detail(value: Any) -> str:
    """The description of a feature that is on: `quant_method bitsandbytes`, `4096`, or nothing."""
    if isinstance(value, Mapping):
        method = value.get("quant_method")
        return f" ({method if isinstance(method, str) else shown(method)})" if method else ""
    return "" if value is True else f" ({shown(value)})"


def to_huggingface_config(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a network, in both key styles, for old and new versions of transformers.

    A Llama-like network is a `LlamaForCausalLM` or another class of transformers. One with learned positions
    or scaled residual branches names the two Python files that it needs next to it (`transformers_code/`).
    """
    fields = config.model_dump(mode="json", exclude=NOT_WRITTEN)
    scaling = fields["rope_scaling"] or {"rope_type": "default"}
    common: dict[str, Any] = {
        **fields,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    named = {"architectures": [ARCHITECTURES[config.model_type]], "model_type": config.model_type, **common}
    if config.model_type == "smollm3":
        named["no_rope_layers"] = list(config.no_rope_layers or ())
    if not config.needs_own_code:
        return named
    return {
        **named,
        "auto_map": {
            "AutoConfig": "configuration_smolctl.SmolctlConfig",
            "AutoModel": "modeling_smolctl.SmolctlModel",
            "AutoModelForCausalLM": f"modeling_smolctl.{OWN_ARCHITECTURE}",
        },
        "position_embedding": config.position_embedding,
        "residual_scale": config.residual_scale,
    }
