"""nanotron's training YAML, SmolLM2's among them, as a model config and a training recipe.

Fields as in `config_smollm2_135M.yaml` of huggingface/smollm. A step of nanotron is
micro_batch_size × batch_accumulation_per_replica × dp sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolctl.config import ModelConfig
from smolctl.config.load import resolve_run_config
from smolctl.errors import InputError
from smolctl.outside import shown
from smolctl.sources.base import ModelSource, SourceKind
from smolctl.sources.huggingface.config import unsupported_feature

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
    unsupported = _unsupported(declared)
    problems: tuple[str, ...] = ()
    run = None
    if not unsupported:
        values, problems = _translate(_Node(content, str(path)))
        run = resolve_run_config(values, str(path))
    return ModelSource(
        kind=SourceKind.NANOTRON,
        id=name,
        config=run.model if run else None,
        unsupported=unsupported,
        declared=declared,
        run=run,
        problems=problems,
    )


def _unsupported(model: Mapping[str, Any]) -> str:
    if model.get("is_llama_config") is False:
        return "a nanotron model with is_llama_config: false is not supported, only Llama's"
    if model.get("rope_scaling"):
        return f"rope_scaling is not supported ({model['rope_scaling']})"
    return unsupported_feature({**model, "model_type": "llama", "architectures": ()})


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


def _translate(node: _Node) -> tuple[dict[str, Any], tuple[str, ...]]:
    micro, accumulation = (
        node.number("tokens.micro_batch_size", 1),
        node.number("tokens.batch_accumulation_per_replica", 1),
    )
    replicas = node.number("parallelism.dp", 1)
    stages = _stages(node)
    seed = stages[0].number("data.seed", 0) if stages else 0
    values = {
        "model": _model(node),
        "tokenizer": node.get("tokenizer.tokenizer_name_or_path"),
        "data": {"sequence_length": node.number("tokens.sequence_length", 2_048), "seed": seed},
        "train": {
            "steps": node.number("tokens.train_steps", 1),
            "batch_size": micro * accumulation * replicas,
            "micro_batch_size": micro,
            "gradient_clip": node.get("optimizer.clip_grad", 0.0),
            "precision": PRECISION.get(node.get("model.dtype"), "auto"),
            "seed": node.number("general.seed", 0),
        },
        "optimizer": _optimizer(node),
        "schedule": _schedule(node),
        "checkpoint": {"every": node.number("checkpoints.checkpoint_interval", 500)},
    }
    return values, _not_carried_over(node, replicas)


def _model(node: _Node) -> dict[str, Any]:
    given = node.get("model.model_config")
    fields = {key: value for key, value in given.items() if key in ModelConfig.model_fields}
    fields.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
    std = node.get("model.init_method.std")
    if std is not None:
        fields["initializer_range"] = std
    theta = given.get("rope_theta", 10_000.0)
    return fields | {"position_embedding": "rope", "rope_theta": theta, "residual_scale": 1.0}


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


def _not_carried_over(node: _Node, replicas: int) -> tuple[str, ...]:
    """What the recipe says that a run here does not do, for a person to read."""
    notes = []
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
        notes.append(
            f"data_stages {', '.join(map(str, folders))}: tokenized nanotron folders are not read; "
            "data.source stays at its default"
        )
    if len(stages) > 1:
        notes.append(f"{len(stages)} data stages: only the first one's seed is carried over")
    style = node.get("optimizer.learning_rate_scheduler.lr_decay_style", "linear")
    if style not in ("linear", "cosine"):
        notes.append(f"lr_decay_style {style} becomes linear")
    if node.get("optimizer.weight_decay"):
        notes.append("nanotron decays every parameter; here weight decay acts on matrices only")
    return tuple(notes)


def _stages(node: _Node) -> list[_Node]:
    stages = node.get("data_stages", ())
    if not isinstance(stages, list | tuple):
        return []
    return [_Node(stage, node.origin) for stage in stages if isinstance(stage, Mapping)]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
