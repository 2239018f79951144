"""Cost and gain of quantization, as a table or JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from smolctl.quantization.calibrate import TensorCost
from smolctl.quantization.footprint import Footprint
from smolctl.quantization.measure import GreedyDivergence
from smolctl.quantization.quantize import QuantizeReport
from smolctl.quantization.record import measurements
from smolctl.quantization.verdict import Variant
from smolctl.timing import with_error
from smolctl.views.numbers import figure, size
from smolctl.views.output import Output
from smolctl.views.tables import headed

COSTS_SHOWN = 10
SOURCE = "source"  # the row above the variants
LEFT = ("variant", "verdict", "engine", "greedy text differs from token")  # columns of text


def show_quantization(out: Output, report: QuantizeReport) -> None:
    """The verdict on every variant."""
    out.document(quantization_document(report))
    if out.json:
        return
    text = f", {report.tokens:,} tokens of the {report.text}" if report.text else ""
    out.line(f"{report.source.id}{text}")
    _show_quality(out, report)
    out.show("")
    if report.text:
        _show_speed(out, report)
    for scheme, costs in report.costs.items():
        _show_costs(out, scheme, costs)
    verdicts = headed(("variant", "verdict"), LEFT)
    for variant in report.variants:
        verdicts.add_row(variant.scheme, variant.verdict)
        if variant.hint:
            verdicts.add_row("", f"try {variant.hint}")
    out.show(verdicts)


def _show_quality(out: Output, report: QuantizeReport) -> None:
    first = next((variant.quality for variant in report.variants if variant.quality), None)
    measured = ("bits/byte", "change", "KL", "top-1", "greedy text differs from token") if first else ()
    table = headed(("variant", "bytes", "bits/weight", *measured), LEFT)
    source_bpb = (f"{first.source_bits_per_byte.mean:.4f}",) if first else ()
    source = report.source
    table.add_row(SOURCE, size(source.bytes), f"{source.bits_per_weight:.2f}", *source_bpb)
    for variant in report.variants:
        cells = [variant.scheme, size(variant.bytes), f"{variant.bits_per_weight:.2f}"]
        quality = variant.quality
        if quality is not None:
            cells += [
                f"{quality.bits_per_byte.mean:.4f}",
                with_error(quality.delta.mean, quality.delta.standard_error, "+.4f"),
                f"{quality.kl.mean:.4f}",
                f"{quality.top1_agreement:.1%}",
                _divergence(variant.divergence),
            ]
        table.add_row(*cells)
    out.show(table)


def _divergence(divergence: GreedyDivergence | None) -> str:
    """`1, 9, –, –`: for every prompt, the first token that differs; a dash: no difference."""
    if divergence is None:
        return ""
    if all(first is None for first in divergence.first):
        return f"none of {divergence.tokens}"
    return ", ".join("–" if first is None else str(first + 1) for first in divergence.first)


def _show_speed(out: Output, report: QuantizeReport) -> None:
    headers = ("variant", "decode tok/s", "speed-up", "prefill tok/s", "load", "peak memory", "engine")
    table = headed(headers, LEFT)
    first = next((variant.speed for variant in report.variants if variant.speed), None)
    source = report.source
    if first is not None:
        table.add_row(
            SOURCE,
            f"{first.source_decode.median:.1f}",
            "",
            f"{first.source_prefill.median:.0f}",
            *_footprint(source.footprint),
            source.engine,
        )
    for variant in report.variants:
        speed = variant.speed
        if speed is not None:
            spread = f"{speed.speedup.low:.2f} to {speed.speedup.high:.2f}"
            table.add_row(
                variant.scheme,
                f"{speed.decode.median:.1f}",
                f"× {speed.speedup.median:.2f} ({spread})",
                f"{speed.prefill.median:.0f}",
                *_footprint(variant.footprint),
                variant.engine,
            )
    out.show(table, "")


def _footprint(footprint: Footprint | None) -> tuple[str, str]:
    if footprint is None:
        return "", ""
    peak = size(footprint.peak_bytes) if footprint.peak_bytes is not None else ""
    return f"{footprint.load_s:.2f} s", peak


def _show_costs(out: Output, scheme: str, costs: Sequence[TensorCost]) -> None:
    inputs = any(cost.largest_input is not None for cost in costs)
    name = f"{scheme}: costliest tensors"
    measured = ("largest input", "median input") if inputs else ()
    table = headed((name, "stored", "bytes", "output error", "KL alone", *measured), (name, "stored"))
    for cost in costs[:COSTS_SHOWN]:
        kl = "" if cost.kl is None else f"{cost.kl:.2g}"
        seen = (cost.largest_input, cost.median_input) if inputs else ()
        table.add_row(
            cost.name,
            cost.stored,
            size(cost.bytes),
            f"{cost.output_error:.1%}",
            kl,
            *("" if value is None else figure(value) for value in seen),
        )
    out.show(table, "")


def quantization_document(report: QuantizeReport) -> Mapping[str, Any]:
    """The JSON document; values that were not measured are null."""
    return {
        "source": asdict(report.source),
        "text": report.text or None,
        "tokens": report.tokens,
        "variants": [_variant(variant) for variant in report.variants],
        "per_tensor": {scheme: [asdict(cost) for cost in costs] for scheme, costs in report.costs.items()},
        "failed_gates": list(report.failed_gates),
    }


def _variant(variant: Variant) -> dict[str, Any]:
    quality, speed, place = variant.quality, variant.speed, variant.footprint
    return {
        **measurements(variant),
        "path": variant.path,
        "checkpoint": variant.checkpoint or None,
        "bits_per_byte_delta_standard_error": quality and quality.delta.standard_error,
        "bits_per_byte_delta_margin": quality and quality.delta.margin,
        "source_bits_per_byte": quality and quality.source_bits_per_byte.mean,
        "kl_standard_error": quality and quality.kl.standard_error,
        "perplexity": quality and quality.perplexity,
        "source_perplexity": quality and quality.source_perplexity,
        "first_divergent_token": variant.divergence and list(variant.divergence.first),
        "load_s": place and place.load_s,
        "peak_rss_bytes": place and place.peak_bytes,
        "prefill_tokens_per_s": speed and speed.prefill.median,
        "speedup_spread": speed and [speed.speedup.low, speed.speedup.high],
        "prefill_speedup": speed and speed.prefill_speedup.median,
        "source_decode_tokens_per_s": speed and speed.source_decode.median,
        "engine": variant.engine or None,
        "plan": list(variant.plan),
        "calibration": variant.calibration and asdict(variant.calibration),
        "hint": variant.hint or None,
    }
