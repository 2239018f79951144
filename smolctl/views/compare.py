"""The comparison of models: a table of the models, a sentence for each pair, or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from smolctl.evaluation.compare import Comparison, Measure, Pair
from smolctl.evaluation.estimate import RESAMPLES
from smolctl.timing import CONFIDENCE
from smolctl.views.model_report import written
from smolctl.views.numbers import size
from smolctl.views.output import Output
from smolctl.views.tables import facts, headed

SHOWN = 8  # number of different settings
LEFT = ("", "model", "engine")


def show_comparison(out: Output, comparison: Comparison) -> None:
    """Show the models, the verdicts, and their basis."""
    out.document(comparison_document(comparison))
    if out.json:
        return
    text = comparison.text
    count = len(text.documents)
    more = f" of {count + text.left_out:,}" if text.left_out else ""
    what = "conversation" if text.is_chat else "document"
    cut = f", long ones cut to {size(text.longest)}" if text.longest else ""
    out.line(
        f"{text.name}: {count:,}{more} {what}{'' if count + text.left_out == 1 else 's'}{cut}, "
        f"{size(text.bytes)}{' of answers' if text.is_chat else ''}, "
        f"in sequences of {comparison.context:,} tokens"
    )
    out.show("", _models(comparison.measures), "")
    for pair in comparison.pairs:
        out.line(f"{pair.verdict}.")
        _show_differences(out, pair)
    what = f"{what}s" if comparison.by_document or text.is_chat else "parts of documents"
    if comparison.observations < 2:
        return
    drawn = f"{RESAMPLES:,} resamples of {comparison.observations:,} {what}"
    out.line(f"± is the {CONFIDENCE:.0%} interval of {drawn}.")
    for note in comparison.notes:
        out.line(note)


def _models(measures: tuple[Measure, ...]) -> Any:
    from rich.text import Text

    pooled = any(len(one.models) > 1 for one in measures)
    headers = ("", "model", "bits/byte", *(("seeds", "between seeds") if pooled else ()), "tokens", "engine")
    table = headed(headers, LEFT)
    for one in measures:
        deviation = "" if one.seed_deviation is None else f"± {one.seed_deviation:.4f}"
        seeds = ", ".join(str(seed) for seed in one.seeds if seed is not None)
        table.add_row(
            one.label,
            Text("\n".join(one.models)),
            "broken" if one.broken else f"{one.bits_per_byte.mean:.4f}",
            *((seeds, deviation) if pooled else ()),
            f"{one.tokens:,}",
            Text(one.engine),
        )
    return table


def _show_differences(out: Output, pair: Pair) -> None:
    from rich.text import Text

    rows = [
        (Text(f"  {item.key}"), Text(f"{written(item.this)} → {written(item.other)}"))
        for item in pair.differences[:SHOWN]
    ]
    if rows:
        out.show(facts(rows, "dim"))
    if len(pair.differences) > SHOWN:
        out.line(f"  and {len(pair.differences) - SHOWN} more settings differ (--json has all)")


def comparison_document(comparison: Comparison) -> Mapping[str, Any]:
    """The JSON document."""
    text = comparison.text
    return {
        "text": {
            "name": text.name,
            "kind": "answers" if text.is_chat else "text",
            "documents": len(text.documents),
            "bytes": text.bytes,
            "left_out": text.left_out,
            "longest": text.longest,
        },
        "context": comparison.context,
        "resampled": "documents" if comparison.by_document else "parts of documents",
        "observations": comparison.observations,
        "resamples": RESAMPLES,
        "confidence": CONFIDENCE,
        "measures": [_measure(one) for one in comparison.measures],
        "pairs": [_pair(one) for one in comparison.pairs],
        "first_is_best": comparison.first_is_best,
        "notes": list(comparison.notes),
    }


def _measure(one: Measure) -> dict[str, Any]:
    return {
        "label": one.label,
        "models": list(one.models),
        "seeds": list(one.seeds),
        "bits_per_byte": one.bits_per_byte.mean,
        "low": one.bits_per_byte.low,
        "high": one.bits_per_byte.high,
        "of_each": list(one.of_each),
        "seed_deviation": one.seed_deviation,
        "broken": one.broken,
        "tokens": one.tokens,
        "engine": one.engine,
    }


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "a": pair.a.label,
        "b": pair.b.label,
        "difference": pair.difference.mean,
        "low": pair.difference.low,
        "high": pair.difference.high,
        "better": pair.better and pair.better.label,
        "detectable": pair.difference.detectable,
        "verdict": pair.verdict,
        "differences": [asdict(item) for item in pair.differences],
    }
