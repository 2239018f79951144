"""The metadata of a model card: the YAML between two lines of --- at the top of README.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolctl.errors import InputError
from smolctl.hub.files import README
from smolctl.outside import parse_yaml

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_MAX_METADATA = 100_000  # characters


def split_card(text: str) -> tuple[str, str]:
    """The front matter with its fences ("" if there is none), and the rest."""
    match = _FRONT_MATTER.match(text)
    return (match[0], text[match.end() :]) if match else ("", text)


def read_metadata(front: str) -> dict[str, Any]:
    """The mapping in a front matter.

    Raises:
        InputError: it is not a YAML mapping.
    """
    remedy = "Correct the part between the --- lines at its top, or delete it."
    content = parse_yaml(front.replace("---", "", 1).rsplit("---", 1)[0], "README.md: metadata", remedy)
    if content is not None and not isinstance(content, dict):
        raise InputError("README.md: the metadata is not a mapping", remedy)
    return content or {}


def card_beside(folder: Path) -> Mapping[str, Any]:
    """The metadata of the card in a folder; empty if there is none that can be read."""
    try:
        with (folder / README).open(encoding="utf-8", errors="replace") as file:
            return read_metadata(split_card(file.read(_MAX_METADATA))[0])
    except (OSError, InputError, RecursionError):
        return {}


def license_of(metadata: Mapping[str, Any]) -> str | None:
    """The license in a card's metadata; several are joined into one text."""
    value = metadata.get("license")
    if value == "other":
        value = metadata.get("license_name") or value
    return ", ".join(map(str, value)) if isinstance(value, list) else value and str(value)
