"""The table of smolctl's engine beside its peers, from the results of benchmarks/decode.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from statistics import median
from typing import Any

from smolctl.timing import Ratio, ratio_of

OLD = 90  # days, after which peers have had releases that were not measured
OURS = {16: "smolctl bf16", 8: "smolctl int8", 4: "smolctl int4"}


def peer_table(results: Mapping[str, Any], today: date | None = None) -> str:
    """Speeds, ratios, and where a peer is faster, in Markdown.

    Args:
        results: of benchmarks/decode.py.
        today: marks results older than 90 days; None: they are not marked.
    """
    engines: Mapping[str, Any] = results["engines"]
    cases = list(dict.fromkeys(case for one in engines.values() for case in one["rates"]))
    rounds = max((len(rates) for one in engines.values() for rates in one["rates"].values()), default=0)
    measured = date.fromisoformat(results["date"])
    old = f" **{age} days old: peers have newer releases.**" if (age := _age(measured, today)) > OLD else ""
    heading = (
        f"{results['model']}, {results['machine']}, {results['threads']} threads, {measured:%B %-d, %Y}, "
        f"smolctl at {results['smolctl']}; tokens per second, medians of {rounds} rounds in turns.{old}"
    )
    speeds = _table(
        ["engine", "version and settings", *cases, "KL"],
        (
            [name, ", ".join(filter(None, (one["version"], one["settings"]))), *_speeds(one, cases), _kl(one)]
            for name, one in engines.items()
            if one["rates"]
        ),
    )
    compared = list(_compared(engines))
    ratios = _table(
        ["ratio", *cases],
        (
            [f"{ours} / {name}", *(_ratio(found[case]) if case in found else "" for case in cases)]
            for ours, name, found in compared
        ),
    )
    faster = [
        f"- {case}: {name} is {1 / ratio.spread.median:.2f} times as fast as {ours}."
        for ours, name, found in compared
        for case, ratio in found.items()
        if _bounds(ratio)[1] < 1
    ]
    left_out = [f"- Not measured: {line[:120].rstrip('.')}." for line in results["left_out"]]
    notes = faster or ["- No peer is faster, beyond noise, at the same bits."]
    return "\n\n".join([heading, speeds, ratios, "\n".join([*notes, *left_out])])


def _age(measured: date, today: date | None) -> int:
    return (today - measured).days if today else 0


def _compared(engines: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Ratio]]]:
    """Every peer with the engine of ours that has as many bits, and the ratios of their speeds by case."""
    for name, one in engines.items():
        ours = OURS.get(one["bits"], "")
        if name == ours or ours not in engines:
            continue
        rates = engines[ours]["rates"]
        if found := {
            case: ratio_of(rates[case], theirs) for case, theirs in one["rates"].items() if case in rates
        }:
            yield ours, name, found


def _speeds(engine: Mapping[str, Any], cases: list[str]) -> list[str]:
    return [f"{median(engine['rates'][case]):.0f}" if case in engine["rates"] else "" for case in cases]


def _kl(engine: Mapping[str, Any]) -> str:
    return "" if engine["kl"] is None else f"{engine['kl']:.5f}"


def _ratio(ratio: Ratio) -> str:
    low, high = _bounds(ratio)
    return f"**{ratio.spread.median:.2f}** ({low:.2f}–{high:.2f})"


def _table(headers: list[str], rows: Iterator[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _bounds(ratio: Ratio) -> tuple[float, float]:
    """The interval of the median, or, of a few rounds, their range."""
    return ratio.interval or (ratio.spread.low, ratio.spread.high)
