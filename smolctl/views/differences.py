"""Two models side by side: only what differs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from smolctl.inspection.differences import Difference, Differences
from smolctl.views.model_report import written
from smolctl.views.output import Output
from smolctl.views.parameters import source_document, title

ABSENT = "—"
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def show_differences(out: Output, differences: Differences) -> None:
    """A table for each kind of difference, or the JSON document."""
    out.document(differences_document(differences))
    if out.json:
        return
    out.show(f"{title(differences.this)} against {title(differences.other)}")
    _show_kind(out, "config", differences.config, differences)
    _show_kind(out, "recipe", differences.recipe, differences)
    _show_kind(out, "tensors", _merged(differences.tensors), differences)


def differences_document(differences: Differences) -> Mapping[str, Any]:
    """The JSON document; a kind that could not be compared is null."""
    return {
        "this": source_document(differences.this),
        "other": source_document(differences.other),
        "same": differences.none,
        "config": [asdict(item) for item in differences.config],
        "recipe": _optional(differences.recipe),
        "tensors": _optional(differences.tensors),
    }


def _optional(items: tuple[Difference, ...] | None) -> list[dict[str, Any]] | None:
    return None if items is None else [asdict(item) for item in items]


def _show_kind(out: Output, kind: str, items: tuple[Difference, ...] | None, whole: Differences) -> None:
    from rich.table import Table
    from rich.text import Text

    if items is None:
        out.show("", f"[dim]{kind}: not compared, they do not both have any[/dim]")
        return
    if not items:
        out.show("", f"{kind}: [green]the same[/green]")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(kind, overflow="fold")
    absent = ABSENT if kind == "tensors" else written(None)
    for source in (whole.this, whole.other):
        name = source.id.rstrip("/").rsplit("/", 1)[-1]  # the line above has the whole
        table.add_column(Text(name), justify="right", overflow="fold")
    for item in items:
        sides = (absent if side is None else written(side) for side in (item.this, item.other))
        table.add_row(Text(item.key), *(Text(side) for side in sides))
    out.show("", table)


def _merged(items: tuple[Difference, ...] | None) -> tuple[Difference, ...] | None:
    """The same difference in many layers as one line: `model.layers.*.self_attn.q_proj.weight (× 30)`."""
    if items is None:
        return None
    groups: dict[tuple[str, Any, Any], list[str]] = {}
    for item in items:
        groups.setdefault((NUMBER.sub("*", item.key), item.this, item.other), []).append(item.key)
    return tuple(
        Difference(keys[0] if len(keys) == 1 else f"{pattern} (× {len(keys)})", this, other)
        for (pattern, this, other), keys in groups.items()
    )
