"""The measurements of a run's quantized variants, stored next to them for the model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from smolctl.quantization.verdict import Variant
from smolctl.runs.layout import VERDICTS
from smolctl.runs.records import add_measurements, read_measurements

VARIANTS = "variants"


class _Named(TypedDict):
    """What distinguishes a variant's record from others."""

    scheme: str
    step: int | None


def record_variants(run: Path, step: int | None, variants: Iterable[Variant]) -> None:
    """Add variants to a run's record; a new variant replaces one of the same scheme and step."""
    fresh = [{**measurements(variant), "step": step} for variant in variants]
    add_measurements(run / VERDICTS, VARIANTS, _Named, fresh, ("scheme", "step"))


def read_variants(run: Path) -> list[Mapping[str, Any]]:
    """All recorded variants; an unreadable record counts as empty."""
    return read_measurements(run / VERDICTS, VARIANTS, _Named)


def measurements(variant: Variant) -> dict[str, Any]:
    """The figures of a variant under the names that all documents use; None if not measured."""
    quality, speed = variant.quality, variant.speed
    return {
        "scheme": variant.scheme,
        "bytes": variant.bytes,
        "bits_per_weight": variant.bits_per_weight,
        "bits_per_byte": quality and quality.bits_per_byte.mean,
        "bits_per_byte_delta": quality and quality.delta.mean,
        "kl_mean": quality and quality.kl.mean,
        "top1_agreement": quality and quality.top1_agreement,
        "decode_tokens_per_s": speed and speed.decode.median,
        "speedup": speed and speed.speedup.median,
        "verdict": variant.verdict,
    }
