"""The results of a bench: tables, Markdown, or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from smolctl.benchmark.baseline import FORMAT, VERSION, Changes
from smolctl.benchmark.report import BenchReport, RelativeSpeed, Result
from smolctl.views.numbers import figure, quantity, size
from smolctl.views.output import Output, fields
from smolctl.views.tables import headed

if TYPE_CHECKING:
    from rich.table import Table

DISTURBED = "disturbed"
# Columns of text.
LEFT = ("suite", "engine", "precision", "of the limit", "output", "against", "verdict")


def show_bench(out: Output, report: BenchReport, changes: Changes | None, markdown: bool) -> None:
    """Show the results, the comparisons between engines, and the comparison with a baseline."""
    out.document(bench_document(report, changes))
    if out.json:
        return
    tables = [_results(report), _comparisons(report)]
    if changes is not None:
        tables.append(_changes(changes))
    for table in tables:
        if table.row_count and markdown:
            out.line("\n".join(_markdown(table)) + "\n")
        elif table.row_count:
            out.show(table, "")
    for line in _lines(report, changes):
        out.line(f"- {line}" if markdown else line)


def _results(report: BenchReport) -> Table:
    headers = ("suite", "engine", "precision", "median", "min to max", "memory", "of the limit", "output")
    table = headed(headers, LEFT)
    for result in report.results:
        table.add_row(
            result.suite,
            result.engine,
            result.precision,
            _amount(result.median, result.unit),
            f"{figure(result.min)} to {figure(result.max)}",
            size(result.peak_rss_bytes) if result.peak_rss_bytes is not None else "",
            _share(result),
            _output(result),
        )
    return table


def _share(result: Result) -> str:
    if result.roofline_share is None or result.limit is None:
        return ""
    return f"{result.roofline_share:.0%} {result.limit.replace('products', 'matmul')}"


def _output(result: Result) -> str:
    if not result.right:
        return f"WRONG, off by {result.answer_error:.2g}"
    return f"off by {result.answer_error:.1g}" if result.answer_error else "equal"


def _comparisons(report: BenchReport) -> Table:
    table = headed(("suite", "engine", "against", "speed", "min to max", "verdict"), LEFT)
    for one in report.comparisons:
        table.add_row(
            one.suite,
            f"{one.engine} {one.precision}",
            f"{one.against} {one.against_precision}",
            f"× {one.ratio.spread.median:.2f}",
            f"{one.ratio.spread.low:.2f} to {one.ratio.spread.high:.2f}",
            _comparison_verdict(one, report.disturbed),
        )
    return table


def _comparison_verdict(one: RelativeSpeed, disturbed: str) -> str:
    interval = one.ratio.interval
    if disturbed and interval is not None:
        return f"{DISTURBED}, 95% interval {interval[0]:.2f} to {interval[1]:.2f}"
    return _verdict(one.ratio.spread.median, one.ratio.beyond_noise, "no significant difference", disturbed)


def _verdict(ratio: float, beyond_noise: bool | None, equal: str, disturbed: str) -> str:
    """Faster or slower only on an otherwise idle machine: threads that spin are slowed down most by other
    work.
    """
    if disturbed:
        return DISTURBED
    if beyond_noise is None:
        return "too few repeats to test"
    if not beyond_noise:
        return equal
    return "faster" if ratio > 1 else "slower"


def _changes(changes: Changes) -> Table:
    table = headed(("suite", "engine", "baseline", "now", "speed", "verdict"), LEFT)
    for one in changes.changes:
        failed = ", BELOW THE LIMIT" if one in changes.failed else ""
        table.add_row(
            one.result.suite,
            f"{one.result.engine} {one.result.precision}",
            _amount(one.before, one.result.unit),
            _amount(one.result.median, one.result.unit),
            f"× {one.ratio:.2f}",
            _verdict(one.ratio, one.beyond_noise, "within the noise", changes.disturbed) + failed,
        )
    return table


def _lines(report: BenchReport, changes: Changes | None) -> list[str]:
    machine, limits = report.machine, report.limits
    rates = ", ".join(f"{name} {quantity(rate)}FLOP/s" for name, rate in limits.products.items())
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = [
        f"{report.model.id}, {report.model.parameters:,} parameters; {report.repeats} repeats in turns after "
        "a warm-up; outputs compared with plain PyTorch in float32",
        f"{machine.cpu}, {machine.logical_cpus} processors, {machine.threads} threads, "
        f"{machine.instructions}",
        f"limits measured in the same rounds: memory {quantity(limits.bandwidth)}B/s, matmul {rates}",
        versions,
        *report.notes,
        *(changes.notes if changes else ()),
        *(f"not compared: {line}" for line in (changes.missing if changes else ())),
    ]
    if report.disturbed:
        fewer = max(1, machine.threads - 1)
        lines.append(
            f"The machine was busy: {report.disturbed}. Times are too long, and ratios are not reliable "
            "either: engines whose threads spin are slowed down most. To repeat, end other programs and run "
            f"the same command again, or leave them a processor with --threads {fewer}."
        )
    return lines


def _amount(value: float, unit: str) -> str:
    return f"{figure(value)} {unit}"


def _markdown(table: Table) -> list[str]:
    headers = [str(column.header) for column in table.columns]
    rules = ["---" if column.justify == "left" else "---:" for column in table.columns]
    cells = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    return [f"| {' | '.join(row)} |" for row in (headers, rules, *cells)]


def bench_document(report: BenchReport, changes: Changes | None = None) -> Mapping[str, Any]:
    """The JSON document that `--save` writes and `--baseline` reads."""
    machine = asdict(report.machine) | asdict(report.load) | {"limits": asdict(report.limits)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "machine": machine,
        "disturbed": report.disturbed,
        "model": asdict(report.model),
        "repeats": report.repeats,
        "results": [
            asdict(one) | {"answers_right": one.right, "interval": one.interval} for one in report.results
        ],
        "comparisons": [
            {
                **fields(one, without=("ratio",)),
                "speed": one.ratio.spread.median,
                "speed_spread": [one.ratio.spread.low, one.ratio.spread.high],
                "speed_interval": one.ratio.interval,
                "beyond_noise": None if report.disturbed else one.ratio.beyond_noise,
                "verdict": _comparison_verdict(one, report.disturbed),
            }
            for one in report.comparisons
        ],
        "notes": list(report.notes),
        "baseline": changes
        and {
            "path": changes.path,
            "fail_below": changes.fail_below,
            "notes": list(changes.notes),
            "missing": list(changes.missing),
            "changes": [
                {
                    "suite": one.result.suite,
                    "engine": one.result.engine,
                    "precision": one.result.precision,
                    "before": one.before,
                    "now": one.result.median,
                    "speed": one.ratio,
                    "beyond_noise": None if changes.disturbed else one.beyond_noise,
                    "failed": one in changes.failed,
                }
                for one in changes.changes
            ],
        },
    }
