"""nanotron's training YAML, SmolLM2's among them, as a model config and a training recipe.

Fields as in `config_smollm2_135M.yaml` of huggingface/smollm. A step of nanotron is
micro_batch_size × batch_accumulation_per_replica × dp sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolctl.config import ModelConfig
from smolctl.config.load import resolve_model_config, resolve_run_config
from smolctl.errors import InputError
from smolctl.outside import shown
from smolctl.sources.base import ModelSource, SourceKind
from smolctl.sources.huggingface.config import SILU

# What nanotron's LlamaConfig assumes for a key that is left out (nanotron/config/models_config.py).
DEFAULTS: Mapping[str, Any] = {
    **{"vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "max_position_embeddings": 2_048, "rms_norm_eps": 1e-6},
    **{"rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": False},
    **{"initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
}
# Those of `ModelConfig` that nanotron spells alike: it has other names for what Llama's near kin do.
KIN = ("rope_scaling", "no_rope_layers", "qkv_bias", "use_qk_norm")
MODEL_FIELDS = tuple(field for field in ModelConfig.model_fields if field not in KIN)
# Qwen2's network without its biases and windows is a Llama's.
NETWORKS = ("is_llama_config", "is_qwen2_config")
# Keys of a model that say how it is computed and not what: fused kernels, caches, logs.
HOW = (
    *("pretraining_tp", "use_cache", "_attn_implementation", "_fused_rms_norm", "_fused_rotary_emb"),
    *("_use_qkv_packed", "_use_doc_masking", "log_attn_probs", "ring_attn_heads_k_stride"),
    *("z_loss_enabled", "z_loss_coefficient"),
)
# Keys that change the computation of a network and none of its parameters.
SAME_PARAMETERS = (
    *("no_rope_layer", "sliding_window_size", "window_size", "rope_scaling", "rope_interleaved"),
    *("flex_attention_mask", "rope_seq_len_interpolation_factor"),
)
# Everything else that is read, or that changes no result, by section. What is not here is named as not read.
READ: Mapping[str, tuple[str, ...]] = {
    "model": ("model_config", "dtype", "init_method", "ddp_bucket_cap_mb", "make_vocab_size_divisible_by"),
    "tokens": (
        *("sequence_length", "train_steps", "micro_batch_size", "batch_accumulation_per_replica"),
        *("limit_test_batches", "limit_val_batches", "val_check_interval"),
    ),
    "optimizer": (
        *("optimizer_factory", "learning_rate_scheduler", "weight_decay", "clip_grad", "zero_stage"),
        *("accumulate_grad_in_fp32", "weight_decay_exclude_named_params"),
    ),
    "optimizer.optimizer_factory": ("name", "adam_beta1", "adam_beta2", "adam_eps", "torch_adam_is_fused"),
    "optimizer.learning_rate_scheduler": (
        *("learning_rate", "lr_warmup_steps", "lr_warmup_style", "lr_decay_style", "lr_decay_steps"),
        *("lr_decay_starting_step", "min_decay_lr"),
    ),
    "tokenizer": ("tokenizer_name_or_path", "tokenizer_max_length", "tokenizer_revision"),
}
PRECISION = {"bfloat16": "bf16-mixed", "float16": "16-mixed", "float32": "32-true"}


def is_nanotron(content: Mapping[str, Any]) -> bool:
    """Whether a YAML's content is nanotron's: our own has the sizes directly under `model`."""
    model = content.get("model")
    return isinstance(model, Mapping) and isinstance(model.get("model_config"), Mapping)


def open_nanotron(content: Mapping[str, Any], path: Path, name: str) -> ModelSource:
    """Translate a nanotron config.

    Raises:
        InputError: a value is of the wrong kind or makes no sense.
    """
    declared: dict[str, Any] = dict(content["model"]["model_config"])
    node = _Node(content, str(path))
    unsupported = _unsupported(declared)
    others = [key for key in _not_understood(declared) if key not in SAME_PARAMETERS]
    model = None if others or not _is_llama(declared) else resolve_model_config(_model(node), str(path))
    problems = _not_carried_over(node)
    run = None
    if model is not None and not unsupported:
        length = node.number("tokens.sequence_length", model.max_position_embeddings)
        if length > model.max_position_embeddings:
            context = f"the model's context of {model.max_position_embeddings:,}"
            problems += (f"tokens.sequence_length {length:,} is longer than {context}: no recipe for train",)
        else:
            run = resolve_run_config(_translate(node), str(path))
    return ModelSource(
        kind=SourceKind.NANOTRON,
        id=name,
        config=None if unsupported else model,
        unsupported=unsupported,
        shape=model,
        declared=declared,
        run=run,
        problems=problems,
    )


def _named(model: Mapping[str, Any]) -> list[str]:
    """The networks that a model says it is of: `is_llama_config` and the like."""
    return [key for key, value in model.items() if key.startswith("is_") and value]


def _is_llama(model: Mapping[str, Any]) -> bool:
    """Whether a model is of a network that can be a Llama's; without a word nanotron takes Llama."""
    named = _named(model)
    return all(key in NETWORKS for key in named) and bool(named or model.get("is_llama_config") is not False)


def _not_understood(model: Mapping[str, Any]) -> list[str]:
    """Keys of a model that are switched on, and that a Llama of ours does not have."""
    known = (*MODEL_FIELDS, *NETWORKS, *HOW)
    return [key for key, value in model.items() if key not in known and value not in (None, False, 0, "none")]


def _unsupported(model: Mapping[str, Any]) -> str:
    others = [key for key in _named(model) if key not in NETWORKS]
    if others:
        return f"a nanotron model with {others[0]} is not supported, only Llama's"
    if not _is_llama(model):
        return "a nanotron model with is_llama_config: false is not supported, only Llama's"
    if keys := _not_understood(model):
        said = ", ".join(f"{key} {shown(model[key])}" for key in keys[:5])
        return f"nanotron's {said} {'is' if len(keys) == 1 else 'are'} not supported"
    activation = model.get("hidden_act", SILU[0])
    return "" if activation in SILU else f"hidden_act {activation} is not supported, only silu"


class _Node:
    """Nested values by dotted path, so that a missing section reads like a missing key."""

    def __init__(self, content: Mapping[str, Any], origin: str) -> None:
        self.content, self.origin = content, origin

    def get(self, dotted: str, default: Any = None) -> Any:
        value: Any = self.content
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
            if value is None:
                return default
        return value

    def number(self, dotted: str, default: int) -> int:
        value = self.get(dotted, default)
        if type(value) is not int:
            raise InputError(
                f"{self.origin}: {dotted} must be a whole number, got {shown(value)}", "Correct the YAML."
            )
        return value


def _translate(node: _Node) -> dict[str, Any]:
    micro, accumulation = (
        node.number("tokens.micro_batch_size", 1),
        node.number("tokens.batch_accumulation_per_replica", 1),
    )
    replicas = node.number("parallelism.dp", 1)
    stages = _stages(node)
    seed = stages[0].number("data.seed", 0) if stages else 0
    context = node.number("model.model_config.max_position_embeddings", 2_048)
    length = node.number("tokens.sequence_length", context)
    masking = bool(node.get("model.model_config._use_doc_masking"))
    z_loss = node.get("model.model_config.z_loss_coefficient", 1e-4)
    return {
        "model": _model(node),
        "tokenizer": node.get("tokenizer.tokenizer_name_or_path"),
        "data": {"sequence_length": length, "seed": seed, "document_masking": masking, **_sources(stages)},
        "train": {
            "steps": node.number("tokens.train_steps", 1),
            "batch_size": micro * accumulation * replicas,
            "micro_batch_size": micro,
            "gradient_clip": node.get("optimizer.clip_grad", 0.0),
            "z_loss": z_loss if node.get("model.model_config.z_loss_enabled") else 0.0,
            "precision": PRECISION.get(node.get("model.dtype"), "auto"),
            "seed": node.number("general.seed", 0),
        },
        "optimizer": _optimizer(node),
        "schedule": _schedule(node),
        "checkpoint": {"every": node.number("checkpoints.checkpoint_interval", 500)},
    }


def _sources(stages: list[_Node]) -> dict[str, Any]:
    """The Hub datasets of the first stage with their shares, as settings of `data`; empty without any."""
    named = stages[0].get("data.dataset.hf_dataset_or_datasets") if stages else None
    if not named:
        return {}
    shares = named if isinstance(named, Mapping) else dict.fromkeys(_as_list(named), 1.0)
    dataset = stages[0].get("data.dataset")
    fields = {"text_field": dataset.get("text_column_name"), "split": dataset.get("hf_dataset_splits")}
    given = {key: value for key, value in fields.items() if isinstance(value, str)}
    weights = tuple(shares.values()) if isinstance(named, Mapping) else None
    return {"source": tuple(map(str, shares)), "weights": weights, **given}


def _model(node: _Node) -> dict[str, Any]:
    given = node.get("model.model_config")
    fields = {**DEFAULTS, **{key: value for key, value in given.items() if key in MODEL_FIELDS}}
    fields["num_key_value_heads"] = fields.get("num_key_value_heads") or fields["num_attention_heads"]
    fields["hidden_act"] = SILU[0]  # another one is refused, and has the same parameters
    std = node.get("model.init_method.std")
    if std is not None:
        fields["initializer_range"] = std
    return fields | {"position_embedding": "rope", "residual_scale": 1.0}


def _optimizer(node: _Node) -> dict[str, Any]:
    factory = "optimizer.optimizer_factory"
    name = str(node.get(f"{factory}.name", "adamW")).lower()
    return {
        "name": name,
        "learning_rate": node.get("optimizer.learning_rate_scheduler.learning_rate", 3e-4),
        "betas": (node.get(f"{factory}.adam_beta1", 0.9), node.get(f"{factory}.adam_beta2", 0.95)),
        "eps": node.get(f"{factory}.adam_eps", 1e-8),
        "weight_decay": node.get("optimizer.weight_decay", 0.0),
    }


def _schedule(node: _Node) -> dict[str, Any]:
    """wsd where the decay begins later than the warmup ends, else a decay in one piece."""
    scheduler = "optimizer.learning_rate_scheduler"
    warmup = node.number(f"{scheduler}.lr_warmup_steps", 0)
    steps = node.number("tokens.train_steps", 1)
    start = node.number(f"{scheduler}.lr_decay_starting_step", warmup)
    decay = node.number(f"{scheduler}.lr_decay_steps", max(steps - start, 0))
    style = node.get(f"{scheduler}.lr_decay_style", "linear")
    name = "cosine" if style == "cosine" and start <= warmup else "wsd"
    return {
        "name": name,
        "warmup_steps": warmup,
        "decay_start": start,
        "decay_steps": decay,
        "min_learning_rate": node.get(f"{scheduler}.min_decay_lr", 0.0),
    }


def _not_carried_over(node: _Node) -> tuple[str, ...]:
    """What the recipe says that a run here does not do, for a person to read."""
    notes = []
    replicas = node.number("parallelism.dp", 1)
    if replicas > 1:
        notes.append(
            f"parallelism.dp {replicas} is not carried over: set trainer.devices; the batch stays whole"
        )
    for axis in ("tp", "pp"):
        if node.number(f"parallelism.{axis}", 1) > 1:
            notes.append(f"parallelism.{axis} {node.get(f'parallelism.{axis}')} is not carried over")
    stages = _stages(node)
    folders = [
        folder for stage in stages for folder in _as_list(stage.get("data.dataset.dataset_folder", ()))
    ]
    if folders:
        shares = _as_list(stages[0].get("data.dataset.dataset_weights", ()))
        first = _as_list(stages[0].get("data.dataset.dataset_folder", ()))
        mixed = dict(zip(map(str, first), shares, strict=False)) if len(shares) == len(first) else {}
        named = [
            f"{folder} ({mixed[folder]})" if folder in mixed else str(folder) for folder in map(str, folders)
        ]
        notes.append(
            f"data_stages {', '.join(named)}: tokenized nanotron folders are not read; data.source stays at "
            "its default, and data.weights takes the shares in parentheses"
        )
    if len(stages) > 1:
        notes.append(f"{len(stages)} data stages: only the first one's seed is carried over")
    if node.number("model.make_vocab_size_divisible_by", 1) > 1:
        notes.append("model.make_vocab_size_divisible_by is not read: vocab_size stays as it is")
    style = node.get("optimizer.learning_rate_scheduler.lr_decay_style", "linear")
    if style not in ("linear", "cosine"):
        notes.append(f"lr_decay_style {style} becomes linear")
    if node.get("optimizer.weight_decay"):
        excluded = node.get("optimizer.weight_decay_exclude_named_params")
        those = f"all but {', '.join(map(str, _as_list(excluded)))}" if excluded else "every parameter"
        notes.append(f"nanotron decays {those}; here weight decay acts on every matrix and on nothing else")
    return (*notes, *_unread(node))


def _unread(node: _Node) -> tuple[str, ...]:
    """Keys that change a training and are not read."""
    found = []
    for section, known in READ.items():
        values = node.get(section)
        keys = values if isinstance(values, Mapping) else {}
        found += [
            f"{section}.{key}" for key in keys if key not in known and keys[key] not in (None, False, 0)
        ]
    return tuple(f"{key} is not read" for key in found)


def _stages(node: _Node) -> list[_Node]:
    stages = node.get("data_stages", ())
    if not isinstance(stages, list | tuple):
        return []
    return [_Node(stage, node.origin) for stage in stages if isinstance(stage, Mapping)]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
