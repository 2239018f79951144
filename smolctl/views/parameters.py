"""Parameters as three totals and a tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from smolctl.config import ModelConfig
from smolctl.inspection.parameters import Basis, ParameterReport
from smolctl.inspection.tree import ModuleNode
from smolctl.sources.base import ModelSource
from smolctl.views.numbers import percent, size
from smolctl.views.output import Output, fields
from smolctl.views.tables import GAP, first_lines, headed

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

TOTALS = {
    "unique": "every stored number once, as in a file of weights",
    "naive": "a tied lm_head counted a second time",
    "non_embedding": "without token table, positions and head",
    "active": "that one token uses: its share of the experts, and the rest",
}
UNKNOWN = "not known"
NOTES_SHOWN = 8


def show_parameters(out: Output, report: ParameterReport, depth: int) -> None:
    """Show totals, tree and notes, or the JSON document."""
    out.document(parameters_document(report, depth))
    if out.json:
        return
    out.show(title(report.source), "", _totals(report), "")
    table = _tree(report, depth, with_formulas=True)
    if fits(out, table):
        out.show(table)
    else:
        out.show(_tree(report, depth, with_formulas=False), "", _formulas(report, depth))
    if report.basis is Basis.CONFIG:
        out.show("", _values(report, depth))
    for remark in _remarks(report):
        out.show("", remark)


def fits(out: Output, table: Table) -> bool:
    """Whether a table fits the terminal without wrapping cells."""
    unlimited = out.stdout.options.update(max_width=10_000)
    return out.stdout.measure(table, options=unlimited).maximum <= out.stdout.width


def title(source: ModelSource) -> Text:
    """The inspected model, on one line."""
    from rich.text import Text

    at = f" at {source.revision[:12]}" if source.revision else ""
    step = f", step {source.step:,}" if source.step is not None else ""
    fetched = f", {size(source.bytes_fetched)} fetched" if source.bytes_fetched else ""
    return Text.assemble((source.id, "bold"), (f" ({source.kind.value}{at}{step}{fetched})", "dim"))


def source_document(source: ModelSource) -> Mapping[str, Any]:
    """The `source` object of JSON documents."""
    return {name: getattr(source, name) for name in ("kind", "id", "revision", "bytes_fetched")}


def parameters_document(report: ParameterReport, depth: int) -> Mapping[str, Any]:
    """The JSON document. Its untied rows add up to `unique`."""
    return {
        "source": source_document(report.source),
        "what_if": list(report.what_if),
        "counted": report.basis.value,
        **vars(report.totals),
        "partial": report.partial,
        "aside": {kind: vars(one) for kind, one in report.aside.items()},
        "header_agrees": report.agrees,
        "notes": list(report.notes),
        "rows": [fields(node, without=("name", "children")) for node in report.rows(depth)],
    }


def _totals(report: ParameterReport) -> Table:
    from rich.table import Column, Table

    number = Column(justify="right", style="bold", no_wrap=True)
    table = Table.grid(number, Column(no_wrap=True), Column(style="dim", overflow="fold"), padding=GAP)
    totals = vars(report.totals)
    for name, meaning in TOTALS.items():
        if name != "active" or totals["active"] != totals["unique"]:
            table.add_row(number_or_unknown(totals[name]), name.replace("_", "-"), meaning)
    return table


def number_or_unknown(number: int | None) -> str:
    """A count in a readable form."""
    return UNKNOWN if number is None else f"{number:,}"


def _tree(report: ParameterReport, depth: int, with_formulas: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    nodes = list(_visible(report.tree, depth))
    copies = any(node.copies > 1 for _, node in nodes)
    table = Table(box=None, pad_edge=False, padding=GAP, header_style="dim")
    table.add_column("module", no_wrap=with_formulas, overflow="fold")
    for name in (*(("copies",) if copies else ()), "shape", "parameters", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    if with_formulas:
        table.add_column("formula", style="dim", no_wrap=True)
    for level, node in nodes:
        inner = bool(node.children) and level + 1 < depth
        cells = [Text("  " * level + node.name, style="bold" if inner else "")]
        if copies:
            cells.append(Text(f"× {node.copies:,}" if node.copies > 1 else ""))
        cells += [
            Text(_shape(node)),
            Text(f"{node.parameters:,}", style="dim" if node.tied else ""),
            Text(
                "tied" if node.tied else _share(node.parameters, report.totals.unique),
                style="dim" if inner else "",
            ),
        ]
        if with_formulas:
            cells.append(Text(_formula(node)))
        table.add_row(*cells)
    return table


def _visible(nodes: tuple[ModuleNode, ...], depth: int, level: int = 0) -> Iterator[tuple[int, ModuleNode]]:
    for node in nodes:
        yield level, node
        if level + 1 < depth:
            yield from _visible(node.children, depth, level + 1)


def _formulas(report: ParameterReport, depth: int) -> Table:
    from rich.text import Text

    table = headed(("module", "formula"), ("module", "formula"))
    table.style = "dim"
    for node in report.rows(depth):
        table.add_row(Text(node.name), Text(_formula(node)))
    return table


def _values(report: ParameterReport, depth: int) -> Text:
    """The values of the names in the formulas."""
    from rich.text import Text

    formulas = " ".join(node.formula for _, node in _visible(report.tree, depth)).split()
    config = report.source.config or report.source.shape
    named = [f"{key} {getattr(config, key):,}" for key in ModelConfig.model_fields if key in formulas]
    return Text(f"where {', '.join(named)}", style="dim")


def _shape(node: ModuleNode) -> str:
    return " × ".join(f"{length:,}" for length in node.shape) if node.shape is not None else ""


def _formula(node: ModuleNode) -> str:
    return f"{node.formula} (the token table again)" if node.tied else node.formula


def _share(parameters: int, unique: int | None) -> str:
    if unique is None:
        return ""
    return percent(parameters / unique if unique else 0.0)


def _remarks(report: ParameterReport) -> Iterator[Text]:
    from rich.text import Text

    good, bad = ("✓ ", "green"), ("! ", "yellow")
    if report.agrees:
        tensors = len(report.source.tensors or ())
        yield Text.assemble(good, f"The {tensors:,} tensors in the file's header agree with the config.")
    elif report.agrees is False:
        yield Text.assemble(bad, "The file's header does not agree with the config, which is counted above:")
    elif report.what_if:
        settings = ", ".join(f"{item:.80}" for item in report.what_if)
        yield Text.assemble(bad, f"What if: {settings}. The source is another model.")
    elif report.basis is Basis.CONFIG:
        why = (
            "the file's header cannot be compared with it"
            if report.aside
            else "there are no weights beside it to compare with"
        )
        yield Text(f"Counted from the config: {why}.", style="dim")
    for note in first_lines(report.notes, NOTES_SHOWN):
        yield Text.assemble(bad, note)
