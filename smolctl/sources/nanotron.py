"""nanotron's training YAML, SmolLM2's among them, as a model config and a training recipe.

Fields as in `config_smollm2_135M.yaml` of huggingface/smollm. A step of nanotron is
micro_batch_size × batch_accumulation_per_replica × dp sequences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from smolctl.config import ModelConfig, RopeScaling
from smolctl.config.load import resolve_model_config, resolve_run_config
from smolctl.errors import InputError
from smolctl.outside import fitting, shown
from smolctl.sources.base import NO_RECIPE, ModelSource, SourceKind
from smolctl.sources.huggingface.config import SILU
from smolctl.sources.shapes import no_rope_layers

T = TypeVar("T")

# What nanotron's LlamaConfig assumes for a key that is left out (nanotron/config/models_config.py).
DEFAULTS: Mapping[str, Any] = {
    **{"vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "max_position_embeddings": 2_048, "rms_norm_eps": 1e-6},
    **{"rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": False},
    **{"initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
}
SEED = 42  # nanotron's DEFAULT_SEED
# Fields of `ModelConfig` that are made of keys with other names or other values.
KIN = ("rope_scaling", "no_rope_layers", "qkv_bias", "use_qk_norm")
MODEL_FIELDS = tuple(field for field in ModelConfig.model_fields if field not in KIN)
# Qwen2's network without its biases and windows is a Llama's.
NETWORKS = ("is_llama_config", "is_qwen2_config")
# Keys of a model that become fields of `KIN`.
KIN_KEYS = ("no_rope_layer", "rope_scaling", "attention_bias")
# Keys of a model that say how it is computed and not what: fused kernels, caches, logs.
HOW = (
    *("pretraining_tp", "use_cache", "_attn_implementation", "_fused_rms_norm", "_fused_rotary_emb"),
    *("_use_qkv_packed", "_use_doc_masking", "log_attn_probs", "ring_attn_heads_k_stride"),
    *("z_loss_enabled", "z_loss_coefficient", "rope_interleaved"),
)
# Keys that change the computation of a network and none of its parameters.
SAME_PARAMETERS = (
    *("sliding_window_size", "window_size", "rope_scaling"),
    *("flex_attention_mask", "rope_seq_len_interpolation_factor"),
)
# Everything else that is read, or that changes no result, by section. What is not here is named as not read.
READ: Mapping[str, tuple[str, ...]] = {
    "": (
        *("checkpoints", "data", "data_stages", "general", "logging", "metrics_logging", "model"),
        *("optimizer", "parallelism", "profiler", "lighteval", "s3_upload", "tokenizer", "tokens"),
    ),
    "model.init_method": ("std",),
    "model": ("model_config", "dtype", "init_method", "ddp_bucket_cap_mb", "make_vocab_size_divisible_by"),
    "tokens": (
        *("sequence_length", "train_steps", "micro_batch_size", "batch_accumulation_per_replica"),
        *("limit_test_batches", "limit_val_batches", "val_check_interval"),
    ),
    "optimizer": (
        *("adam_beta1", "adam_beta2", "adam_eps", "torch_adam_is_fused", "optimizer_factory"),
        *("learning_rate_scheduler", "weight_decay", "clip_grad", "zero_stage"),
        *("accumulate_grad_in_fp32", "weight_decay_exclude_named_params"),
    ),
    "optimizer.optimizer_factory": ("name", "adam_beta1", "adam_beta2", "adam_eps", "torch_adam_is_fused"),
    "optimizer.learning_rate_scheduler": (
        *("learning_rate", "lr_warmup_steps", "lr_warmup_style", "lr_decay_style", "lr_decay_steps"),
        *("lr_decay_starting_step", "min_decay_lr"),
    ),
    "tokenizer": ("tokenizer_name_or_path", "tokenizer_max_length", "tokenizer_revision"),
}
# The matrices of a nanotron network, by the names that the patterns of `EXCLUSIONS` are compared with. Norms
# and biases never decay here.
EXCLUSIONS = "optimizer.weight_decay_exclude_named_params"
WILDCARDS = re.compile(r"\^?(?P<anywhere>\.\*)?(?P<text>[\w.]*?)(\.\*)?\$?")
BLOCK, TABLE = "model.decoder.0.pp_block.", "model.token_position_embeddings.pp_block.token_embedding.weight"
HEAD = "model.lm_head.pp_block.weight"
MATRICES = (
    *(TABLE, HEAD, f"{BLOCK}attn.qkv_proj.weight", f"{BLOCK}attn.o_proj.weight"),
    *(f"{BLOCK}mlp.gate_up_proj.weight", f"{BLOCK}mlp.down_proj.weight"),
)
SHARES = "data.dataset.dataset_weights"
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
            problems += (f"tokens.sequence_length {length:,} is longer than {context}: {NO_RECIPE}",)
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
    known = {*MODEL_FIELDS, *NETWORKS, *HOW, *KIN_KEYS}
    if model.get("rope_scaling") and _rope_scaling(model) is None:
        known.remove("rope_scaling")
    if model.get("no_rope_layer") or not model.get("is_qwen2_config"):  # nanotron's Llama has no biases
        known.remove("attention_bias")
    return [key for key, value in model.items() if key not in known and value not in (None, False, 0, "none")]


def _rope_scaling(model: Mapping[str, Any]) -> RopeScaling | None:
    """Llama 3's scaling of rope; None where there is none, or another."""
    given = model.get("rope_scaling")
    return fitting(RopeScaling, given) if isinstance(given, Mapping) and given.get("rope_type") else None


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
        return self._of_type(int, "a whole number", dotted, default)

    def flag(self, dotted: str, default: bool = False) -> bool:
        return self._of_type(bool, "true or false", dotted, default)

    def _of_type(self, kind: type[T], spelled: str, dotted: str, default: T) -> T:
        value = self.get(dotted, default)
        if type(value) is not kind:
            raise InputError(
                f"{self.origin}: {dotted} must be {spelled}, got {shown(value)}", "Correct the YAML."
            )
        return value


def _translate(node: _Node) -> dict[str, Any]:
    micro, accumulation = (
        node.number("tokens.micro_batch_size", 1),
        node.number("tokens.batch_accumulation_per_replica", 1),
    )
    replicas = node.number("parallelism.dp", 1)
    stages = _stages(node)
    seed = stages[0].number("data.seed", SEED) if stages else SEED
    context = node.number("model.model_config.max_position_embeddings", 2_048)
    length = node.number("tokens.sequence_length", context)
    masking = node.flag("model.model_config._use_doc_masking")
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
            "z_loss": z_loss if node.flag("model.model_config.z_loss_enabled") else 0.0,
            "precision": PRECISION.get(node.get("model.dtype"), "auto"),
            "seed": node.number("general.seed", SEED),
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
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields["hidden_act"] = SILU[0]  # another one is refused, and has the same parameters
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


def _optimizer(node: _Node) -> dict[str, Any]:
    factory = "optimizer.optimizer_factory"
    if node.get(factory) is None:  # older recipes have its settings one level higher
        factory = "optimizer"
    name = str(node.get(f"{factory}.name", "adamW")).lower()
    return {
        "name": name,
        "learning_rate": node.get("optimizer.learning_rate_scheduler.learning_rate", 3e-4),
        "betas": (node.get(f"{factory}.adam_beta1", 0.9), node.get(f"{factory}.adam_beta2", 0.95)),
        "eps": node.get(f"{factory}.adam_eps", 1e-8),
        "weight_decay": node.get("optimizer.weight_decay", 0.0),
        "decay_embeddings": TABLE not in _not_decaying(node),
    }


def _not_decaying(node: _Node) -> list[str]:
    """Those of `MATRICES` that a recipe excludes from weight decay; a tied head and its table are one."""
    patterns = [match for text in _exclusions(node) if (match := WILDCARDS.fullmatch(text))]
    found = [
        name
        for name in MATRICES
        if any(
            pattern["text"] in name if pattern["anywhere"] else name.startswith(pattern["text"])
            for pattern in patterns
        )
    ]
    return [*found, TABLE, HEAD] if _is_tied(node) and {TABLE, HEAD} & set(found) else found


def _is_tied(node: _Node) -> bool:
    return node.flag("model.model_config.tie_word_embeddings", DEFAULTS["tie_word_embeddings"])


def _exclusions(node: _Node) -> list[str]:
    return [str(text).replace("\\", "") for text in _as_list(node.get(EXCLUSIONS, ()))]


def _schedule(node: _Node) -> dict[str, Any]:
    """wsd where the decay begins later than the warmup ends, else a decay in one piece."""
    scheduler = "optimizer.learning_rate_scheduler"
    warmup = node.number(f"{scheduler}.lr_warmup_steps", 0)
    start = node.number(f"{scheduler}.lr_decay_starting_step", warmup)
    left = max(node.number("tokens.train_steps", 1) - warmup, 0)
    return {
        "name": "cosine" if _decay_style(node) == "cosine" and start <= warmup else "wsd",
        "warmup_steps": 0 if node.get(f"{scheduler}.lr_warmup_style") == "constant" else warmup,
        "decay_start": start,
        "decay_steps": node.number(f"{scheduler}.lr_decay_steps", left),
        "min_learning_rate": node.get(f"{scheduler}.min_decay_lr", _peak(node)),
    }


def _peak(node: _Node) -> Any:
    return node.get("optimizer.learning_rate_scheduler.learning_rate", 3e-4)


def _decay_style(node: _Node) -> str:
    return str(node.get("optimizer.learning_rate_scheduler.lr_decay_style", "linear"))


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
    return (*notes, *_data_notes(node), *_model_notes(node), *_optimizer_notes(node), *_unread(node))


def _data_notes(node: _Node) -> Iterator[str]:
    stages = _stages(node)
    named = []
    for stage in stages:
        given = stage.get("data.dataset.dataset_folder", ())
        folders = list(given) if isinstance(given, Mapping) else _as_list(given)
        shares = given.values() if isinstance(given, Mapping) else _as_list(stage.get(SHARES, ()))
        with_share = zip(folders, shares, strict=False) if len(shares) == len(folders) else ()
        named += [f"{folder} ({share})" for folder, share in with_share] or list(map(str, folders))
    if named:
        yield (
            f"data_stages {', '.join(named)}: folders of tokens, which only nanotron reads; set data.source "
            "to the same texts, and data.weights to shares such as those in parentheses"
        )
    if len(stages) > 1:
        yield f"{len(stages)} data stages: only the first one is carried over"


def _model_notes(node: _Node) -> Iterator[str]:
    if started := node.get("checkpoints.resume_checkpoint_path") or node.get("model.init_method.path"):
        yield f"nanotron starts from the weights in {shown(started)}: name the same ones with --init-from"
    if node.get("model.model_config.rope_scaling"):
        yield "nanotron ignores rope_scaling; here it is computed as the recipe says"
    if node.flag("model.model_config.rope_interleaved"):
        yield (
            "nanotron's rope_interleaved rotates neighbours, here rope rotates halves: the same network with"
            " the rows of q_proj and k_proj in another order"
        )
    multiple = node.number("model.make_vocab_size_divisible_by", 1) * node.number("parallelism.tp", 1)
    vocab = node.number("model.model_config.vocab_size", DEFAULTS["vocab_size"])
    if multiple > 0 and vocab % multiple:
        padded = vocab + -vocab % multiple
        yield f"nanotron pads the vocabulary to {padded:,} tokens; here vocab_size stays {vocab:,}"


def _optimizer_notes(node: _Node) -> Iterator[str]:
    style, ours = _decay_style(node), _schedule(node)["name"]
    if style != {"cosine": "cosine", "wsd": "linear"}[ours]:
        yield f"lr_decay_style {style} becomes linear"
    if not node.get("optimizer.weight_decay"):
        return
    patterns, excluded = _exclusions(node), set(_not_decaying(node))
    ignored = [text for text in patterns if WILDCARDS.fullmatch(text) is None]
    if ignored or excluded - {TABLE, HEAD if _is_tied(node) else TABLE}:
        yield (
            f"{EXCLUSIONS} {', '.join(patterns)}: here weight decay can leave out norms, biases and the token"
            " table, and nothing else"
        )
    elif not any("norm" in text for text in patterns):
        yield "nanotron decays norms too; here weight decay acts on matrices only"


def _unread(node: _Node) -> tuple[str, ...]:
    """Keys that change a training and are not read."""
    found = []
    for section, known in READ.items():
        values = node.get(section) if section else node.content
        keys = values if isinstance(values, Mapping) else {}
        begin = f"{section}." if section else ""
        found += [f"{begin}{key}" for key in keys if key not in known and keys[key] not in (None, False, 0)]
    return tuple(f"{key} is not read" for key in found)


def _stages(node: _Node) -> list[_Node]:
    stages = node.get("data_stages") or [node.content]  # older recipes have one, without a list
    if not isinstance(stages, list | tuple):
        return []
    return [_Node(stage, node.origin) for stage in stages if isinstance(stage, Mapping)]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
