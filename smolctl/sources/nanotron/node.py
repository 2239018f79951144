"""The settings of a nanotron YAML by dotted name, with type checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from smolctl.errors import InputError
from smolctl.outside import shown

T = TypeVar("T")


class Node:
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

    def stages(self) -> list[Node]:
        """The stages of the data, each as a node."""
        stages = self.get("data_stages") or [self.content]  # older recipes have one stage without a list
        if not isinstance(stages, list | tuple):
            return []
        return [Node(stage, self.origin) for stage in stages if isinstance(stage, Mapping)]

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


def as_list(value: Any) -> list[Any]:
    """A list unchanged, and anything else as a list with one entry."""
    return list(value) if isinstance(value, list | tuple) else [value]
