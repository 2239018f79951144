"""Settings of a nanotron YAML that a run does not apply, as notes for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from smolctl.outside import shown
from smolctl.sources.nanotron.network import DEFAULTS, is_tied
from smolctl.sources.nanotron.node import Node, as_list
from smolctl.sources.nanotron.recipe import (
    EXCLUSIONS,
    HEAD,
    TABLE,
    WILDCARDS,
    decay_style,
    exclusions,
    not_decaying,
    schedule_fields,
)

# All other keys that are read, or that do not affect results, by section. Keys that are not listed are
# reported as ignored.
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
SHARES = "data.dataset.dataset_weights"


def not_carried_over(node: Node) -> tuple[str, ...]:
    """Notes on the settings of the recipe that a run does not apply."""
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


def _data_notes(node: Node) -> Iterator[str]:
    stages = node.stages()
    named = []
    for stage in stages:
        given = stage.get("data.dataset.dataset_folder", ())
        folders = list(given) if isinstance(given, Mapping) else as_list(given)
        shares = given.values() if isinstance(given, Mapping) else as_list(stage.get(SHARES, ()))
        with_share = zip(folders, shares, strict=False) if len(shares) == len(folders) else ()
        named += [f"{folder} ({share})" for folder, share in with_share] or list(map(str, folders))
    if named:
        yield (
            f"data_stages {', '.join(named)}: folders of tokens, which only nanotron reads; set data.source "
            "to the same texts, and data.weights to shares such as those in parentheses"
        )
    if len(stages) > 1:
        yield f"{len(stages)} data stages: only the first one is carried over"


def _model_notes(node: Node) -> Iterator[str]:
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


def _optimizer_notes(node: Node) -> Iterator[str]:
    style, ours = decay_style(node), schedule_fields(node)["name"]
    if style != {"cosine": "cosine", "wsd": "linear"}[ours]:
        yield f"lr_decay_style {style} becomes linear"
    if not node.get("optimizer.weight_decay"):
        return
    patterns, excluded = exclusions(node), set(not_decaying(node))
    ignored = [text for text in patterns if WILDCARDS.fullmatch(text) is None]
    if ignored or excluded - {TABLE, HEAD if is_tied(node) else TABLE}:
        yield (
            f"{EXCLUSIONS} {', '.join(patterns)}: here weight decay can leave out norms, biases and the token"
            " table, and nothing else"
        )
    elif not any("norm" in text for text in patterns):
        yield "nanotron decays norms too; here weight decay acts on matrices only"


def _unread(node: Node) -> tuple[str, ...]:
    """Keys that affect training but are ignored."""
    found = []
    for section, known in READ.items():
        values = node.get(section) if section else node.content
        keys = values if isinstance(values, Mapping) else {}
        begin = f"{section}." if section else ""
        found += [f"{begin}{key}" for key in keys if key not in known and keys[key] not in (None, False, 0)]
    return tuple(f"{key} is ignored" for key in found)
