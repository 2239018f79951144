"""Differences between two models: configs, recipes and tensors, for all kinds of MODEL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smolctl.config import ModelConfig, RunConfig
from smolctl.errors import InputError
from smolctl.sources.base import ModelSource

FIELDS = tuple(ModelConfig.model_fields)


@dataclass(frozen=True)
class Difference:
    """A key or tensor that differs. None: it is missing on that side."""

    key: str
    this: Any
    other: Any


@dataclass(frozen=True)
class Differences:
    """All differences by kind; a kind is None if one of the models has nothing of it to compare."""

    this: ModelSource
    other: ModelSource
    config: tuple[Difference, ...]
    recipe: tuple[Difference, ...] | None
    tensors: tuple[Difference, ...] | None  # of shapes; of dtypes if the shapes are equal

    @property
    def none(self) -> bool:
        """Whether no compared value differs."""
        return not (self.config or self.recipe or self.tensors)


def compare(this: ModelSource, other: ModelSource) -> Differences:
    """Compare two models.

    Configs are compared in normalized form; if smolctl cannot represent one of the models, only by the keys
    that are in both; if it can represent neither, as written in the files.
    """
    recipe = None
    if this.run is not None and other.run is not None:
        recipe = _differences(_recipe(this.run), _recipe(other.run))
        if any(item.key == "tokenizer" for item in recipe) and _is_same_tokenizer(this, other):
            recipe = tuple(item for item in recipe if item.key != "tokenizer")  # one was inherited
    tensors = None
    if this.tensors is not None and other.tensors is not None:
        tensors = _differences(_tensors(this), _tensors(other))
    config = _differences(*_comparable(this, other))
    return Differences(this, other, config, recipe, tensors)


def _comparable(this: ModelSource, other: ModelSource) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    models = [source.config or source.shape for source in (this, other)]
    if models == [None, None]:
        return this.declared, other.declared
    sides = [
        model.model_dump()
        if model
        else {key: source.declared[key] for key in FIELDS if key in source.declared}
        for model, source in zip(models, (this, other), strict=True)
    ]
    if None in models:  # a value missing in one of them has an unknown default
        sides = [
            {key: side[key] for key in side if key in sides[0].keys() & sides[1].keys()} for side in sides
        ]
        sides += [{"model_type": source.declared.get("model_type", "llama")} for source in (this, other)]
        return {**sides[2], **sides[0]}, {**sides[3], **sides[1]}
    return sides[0], sides[1]


def _differences(this: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Difference, ...]:
    keys = [*this, *(key for key in other if key not in this)]
    return tuple(
        Difference(key, this.get(key), other.get(key)) for key in keys if this.get(key) != other.get(key)
    )


def _recipe(run: RunConfig) -> dict[str, Any]:
    whole = run.with_whole_steps()  # a share of the steps may be the same number
    return {key: value for key, value in whole.settings().items() if not key.startswith("model.")}


def _is_same_tokenizer(this: ModelSource, other: ModelSource) -> bool:
    try:
        one, another = this.read_tokenizer(), other.read_tokenizer()
    except InputError:
        return False
    return one is not None and another is not None and one.tokenizer_json == another.tokenizer_json


def _tensors(source: ModelSource) -> dict[str, str]:
    return {
        tensor.name: f"{' × '.join(str(size) for size in tensor.shape)} {tensor.dtype}"
        for tensor in source.tensors or ()
    }
