"""A nanotron YAML as a `ModelSource`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolctl.config.load import resolve_model_config, resolve_run_config
from smolctl.sources.base import NO_RECIPE, ModelSource, SourceKind
from smolctl.sources.nanotron.network import (
    SAME_PARAMETERS,
    is_llama,
    model_fields,
    not_understood,
    unsupported_feature,
)
from smolctl.sources.nanotron.node import Node
from smolctl.sources.nanotron.notes import not_carried_over
from smolctl.sources.nanotron.recipe import translate


def is_nanotron(content: Mapping[str, Any]) -> bool:
    """Whether a YAML's content is nanotron's: smolctl's has the sizes directly under `model`."""
    model = content.get("model")
    return isinstance(model, Mapping) and isinstance(model.get("model_config"), Mapping)


def open_nanotron(content: Mapping[str, Any], path: Path, name: str) -> ModelSource:
    """Translate a nanotron config.

    Raises:
        InputError: a value has the wrong type or is not valid.
    """
    declared: dict[str, Any] = dict(content["model"]["model_config"])
    node = Node(content, str(path))
    unsupported = unsupported_feature(declared)
    others = [key for key in not_understood(declared) if key not in SAME_PARAMETERS]
    model = None if others or not is_llama(declared) else resolve_model_config(model_fields(node), str(path))
    problems = not_carried_over(node)
    run = None
    if model is not None and not unsupported:
        length = node.number("tokens.sequence_length", model.max_position_embeddings)
        if length > model.max_position_embeddings:
            context = f"the model's context of {model.max_position_embeddings:,}"
            problems += (f"tokens.sequence_length {length:,} is longer than {context}: {NO_RECIPE}",)
        else:
            run = resolve_run_config(translate(node), str(path))
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
