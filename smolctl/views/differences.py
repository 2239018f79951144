"""Shows only the differences of two models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from smolctl.inspection.differences import Difference, Differences
from smolctl.views.model_report import written
from smolctl.views.output import Output
from smolctl.views.parameters import source_document, title
from smolctl.views.tables import headed

ABSENT = "—"
KINDS = ("config", "recipe", "tensors")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def show_differences(out: Output, differences: Differences) -> None:
    """A table for each kind of difference, or the JSON document."""
    out.document(differences_document(differences))
    if out.json:
        return
    from rich.text import Text

    out.show(Text.assemble(title(differences.this), " against ", title(differences.other)))
    for kind in KINDS:
        _show_kind(out, kind, differences)


def differences_document(differences: Differences) -> Mapping[str, Any]:
    """The JSON document; a kind that could not be compared is null."""
    kinds = [(kind, getattr(differences, kind)) for kind in KINDS]
    return {
        "this": source_document(differences.this),
        "other": source_document(differences.other),
        "same": differences.none,
        **{kind: items and [asdict(item) for item in items] for kind, items in kinds},
    }


def _show_kind(out: Output, kind: str, differences: Differences) -> None:
    from rich.text import Text

    items: tuple[Difference, ...] | None = getattr(differences, kind)
    if items is None:
        out.show("", Text(f"{kind}: not compared, as at least one has none", style="dim"))
        return
    if not items:
        out.show("", Text.assemble(f"{kind}: ", ("the same", "green")))
        return
    table = headed((kind,), (kind,))
    absent = ABSENT if kind == "tensors" else written(None)
    for source in (differences.this, differences.other):
        name = source.id.rstrip("/").rsplit("/", 1)[-1]  # the line above has the full name
        table.add_column(Text(name), justify="right", overflow="fold")
    for item in _merged(items) if kind == "tensors" else items:
        sides = (absent if side is None else written(side) for side in (item.this, item.other))
        table.add_row(Text(item.key), *(Text(side) for side in sides))
    out.show("", table)


def _merged(items: tuple[Difference, ...]) -> tuple[Difference, ...]:
    """The same difference in many layers as one line: `model.layers.*.self_attn.q_proj.weight (× 30)`."""
    groups: dict[tuple[str, Any, Any], list[str]] = {}
    for item in items:
        groups.setdefault((NUMBER.sub("*", item.key), item.this, item.other), []).append(item.key)
    return tuple(
        Difference(keys[0] if len(keys) == 1 else f"{pattern} (× {len(keys)})", this, other)
        for (pattern, this, other), keys in groups.items()
    )
