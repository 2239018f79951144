"""How two models differ: configs, recipes and tensors, whatever kinds of MODEL they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smolctl.config import RunConfig
from smolctl.sources.base import ModelSource


@dataclass(frozen=True)
class Difference:
    """One key or tensor that the two do not share. None: it is absent on that side."""

    key: str
    this: Any
    other: Any


@dataclass(frozen=True)
class Differences:
    """All of them, by kind; a kind is None when one of the two has nothing of it to compare."""

    this: ModelSource
    other: ModelSource
    config: tuple[Difference, ...]
    recipe: tuple[Difference, ...] | None
    tensors: tuple[Difference, ...] | None  # their shapes; dtypes where the shapes are equal

    @property
    def none(self) -> bool:
        """Whether nothing that could be compared differs."""
        return not (self.config or self.recipe or self.tensors)


def compare(this: ModelSource, other: ModelSource) -> Differences:
    """Lay two models side by side.

    The configs are compared in normalised form; when this toolkit cannot represent one of the two, as
    both files spell them.
    """
    recipe = None
    if this.run is not None and other.run is not None:
        recipe = _differences(_recipe(this.run), _recipe(other.run))
    tensors = None
    if this.tensors is not None and other.tensors is not None:
        tensors = _differences(_tensors(this), _tensors(other))
    if this.config is not None and other.config is not None:
        config = _differences(this.config.model_dump(), other.config.model_dump())
    else:
        config = _differences(this.declared, other.declared)
    return Differences(this, other, config, recipe, tensors)


def _differences(this: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Difference, ...]:
    keys = [*this, *(key for key in other if key not in this)]
    return tuple(
        Difference(key, this.get(key), other.get(key)) for key in keys if this.get(key) != other.get(key)
    )


def _recipe(run: RunConfig) -> dict[str, Any]:
    whole = run.with_whole_steps()  # a share of the steps may be the same number
    return {key: value for key, value in whole.settings().items() if not key.startswith("model.")}


def _tensors(source: ModelSource) -> dict[str, str]:
    return {
        tensor.name: f"{' × '.join(str(size) for size in tensor.shape)} {tensor.dtype}"
        for tensor in source.tensors or ()
    }
