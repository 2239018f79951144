"""Tables without rules, with two spaces between columns."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

GAP = (0, 2, 0, 0)


def headed(headers: Iterable[str], left: Container[str]) -> Table:
    """An empty table with a dim header; columns that are not in `left` are right-aligned."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=GAP, header_style="dim")
    for name in headers:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


def facts(rows: Iterable[Sequence[RenderableType]], style: str = "") -> Table:
    """Styled names, each followed by its text, wrapped if it is long."""
    from rich.table import Column, Table

    table = Table.grid(Column(style=style, no_wrap=True), Column(overflow="fold"), padding=GAP)
    for row in rows:
        table.add_row(*row)
    return table


def first_lines(lines: Sequence[str], most: int) -> list[str]:
    """The first lines, and the number of further ones."""
    more = [f"and {len(lines) - most:,} more (--json has all)"] if len(lines) > most else []
    return [*lines[:most], *more]
