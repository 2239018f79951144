"""The training recipe of a nanotron YAML, as settings of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from smolctl.sources.nanotron.network import DEFAULTS, is_tied, model_fields
from smolctl.sources.nanotron.node import Node, as_list

SEED = 42  # nanotron's DEFAULT_SEED
PRECISION = {"bfloat16": "bf16-mixed", "float16": "16-mixed", "float32": "32-true"}
SCHEDULER = "optimizer.learning_rate_scheduler"
# The matrices of a nanotron network, by the names that the patterns of `EXCLUSIONS` are matched with. Norms
# and biases never decay here.
EXCLUSIONS = "optimizer.weight_decay_exclude_named_params"
WILDCARDS = re.compile(r"\^?(?P<anywhere>\.\*)?(?P<text>[\w.]*?)(\.\*)?\$?")
BLOCK, TABLE = "model.decoder.0.pp_block.", "model.token_position_embeddings.pp_block.token_embedding.weight"
HEAD = "model.lm_head.pp_block.weight"
MATRICES = (
    *(TABLE, HEAD, f"{BLOCK}attn.qkv_proj.weight", f"{BLOCK}attn.o_proj.weight"),
    *(f"{BLOCK}mlp.gate_up_proj.weight", f"{BLOCK}mlp.down_proj.weight"),
)


def translate(node: Node) -> dict[str, Any]:
    """The settings of a run, section by section.

    Raises:
        InputError: a value is of the wrong type.
    """
    micro = node.number("tokens.micro_batch_size", 1)
    accumulation = node.number("tokens.batch_accumulation_per_replica", 1)
    replicas = node.number("parallelism.dp", 1)
    stages = node.stages()
    seed = stages[0].number("data.seed", SEED) if stages else SEED
    context = node.number("model.model_config.max_position_embeddings", DEFAULTS["max_position_embeddings"])
    length = node.number("tokens.sequence_length", context)
    masking = node.flag("model.model_config._use_doc_masking")
    z_loss = node.get("model.model_config.z_loss_coefficient", 1e-4)
    return {
        "model": model_fields(node),
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
        "schedule": schedule_fields(node),
        "checkpoint": {"every": node.number("checkpoints.checkpoint_interval", 500)},
    }


def _sources(stages: list[Node]) -> dict[str, Any]:
    """The Hub datasets of the first stage with their shares, as settings of `data`; empty if there are
    none.
    """
    named = stages[0].get("data.dataset.hf_dataset_or_datasets") if stages else None
    if not named:
        return {}
    shares = named if isinstance(named, Mapping) else dict.fromkeys(as_list(named), 1.0)
    dataset = stages[0].get("data.dataset")
    fields = {"text_field": dataset.get("text_column_name"), "split": dataset.get("hf_dataset_splits")}
    given = {key: value for key, value in fields.items() if isinstance(value, str)}
    weights = tuple(shares.values()) if isinstance(named, Mapping) else None
    return {"source": tuple(map(str, shares)), "weights": weights, **given}


def _optimizer(node: Node) -> dict[str, Any]:
    factory = "optimizer.optimizer_factory"
    if node.get(factory) is None:  # older recipes have its settings one level higher
        factory = "optimizer"
    name = str(node.get(f"{factory}.name", "adamW")).lower()
    return {
        "name": name,
        "learning_rate": _peak(node),
        "betas": (node.get(f"{factory}.adam_beta1", 0.9), node.get(f"{factory}.adam_beta2", 0.95)),
        "eps": node.get(f"{factory}.adam_eps", 1e-8),
        "weight_decay": node.get("optimizer.weight_decay", 0.0),
        "decay_embeddings": TABLE not in not_decaying(node),
    }


def not_decaying(node: Node) -> list[str]:
    """The `MATRICES` that a recipe excludes from weight decay; a tied head and its table count as one."""
    patterns = [match for text in exclusions(node) if (match := WILDCARDS.fullmatch(text))]
    found = [
        name
        for name in MATRICES
        if any(
            pattern["text"] in name if pattern["anywhere"] else name.startswith(pattern["text"])
            for pattern in patterns
        )
    ]
    return [*found, TABLE, HEAD] if is_tied(node) and {TABLE, HEAD} & set(found) else found


def exclusions(node: Node) -> list[str]:
    """The patterns of names without weight decay."""
    return [str(text).replace("\\", "") for text in as_list(node.get(EXCLUSIONS, ()))]


def schedule_fields(node: Node) -> dict[str, Any]:
    """wsd if the decay begins after the end of the warmup, else a continuous decay."""
    warmup = node.number(f"{SCHEDULER}.lr_warmup_steps", 0)
    start = node.number(f"{SCHEDULER}.lr_decay_starting_step", warmup)
    left = max(node.number("tokens.train_steps", 1) - warmup, 0)
    return {
        "name": "cosine" if decay_style(node) == "cosine" and start <= warmup else "wsd",
        "warmup_steps": 0 if node.get(f"{SCHEDULER}.lr_warmup_style") == "constant" else warmup,
        "decay_start": start,
        "decay_steps": node.number(f"{SCHEDULER}.lr_decay_steps", left),
        "min_learning_rate": node.get(f"{SCHEDULER}.min_decay_lr", _peak(node)),
    }


def _peak(node: Node) -> Any:
    return node.get(f"{SCHEDULER}.learning_rate", 3e-4)


def decay_style(node: Node) -> str:
    """The shape of the learning rate's decay: cosine, linear, or one that becomes linear here."""
    return str(node.get(f"{SCHEDULER}.lr_decay_style", "linear"))
