"""What was measured on a run's quantized variants, kept beside them for the model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from smolctl.durable import write_text
from smolctl.errors import InputError
from smolctl.escaping import json_text
from smolctl.outside import fitting, read_json
from smolctl.quantization.verdict import Variant
from smolctl.runs.folder import QUANTIZED

RECORD = Path(QUANTIZED) / "verdict.json"  # in the run's folder


class _Named(TypedDict):
    """What a variant's record must have to be told from others."""

    scheme: str
    step: int | None


def record_variants(run: Path, step: int | None, variants: Iterable[Variant]) -> None:
    """Add variants to a run's record; of the same scheme and step the newest counts."""
    fresh = [{**measurements(variant), "step": step} for variant in variants]
    replaced = {(facts["scheme"], facts["step"]) for facts in fresh}
    kept = [facts for facts in read_record(run) if (facts.get("scheme"), facts.get("step")) not in replaced]
    path = run / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json_text({"variants": [*kept, *fresh]}, indent=2) + "\n")


def read_record(run: Path) -> list[Mapping[str, Any]]:
    """Every variant that was recorded; an unreadable record is an empty one."""
    try:
        found = read_json(run / RECORD).get("variants")
    except InputError:
        return []
    return [facts for facts in found if fitting(_Named, facts)] if isinstance(found, list) else []


def measurements(variant: Variant) -> dict[str, Any]:
    """The figures of a variant that every document names alike; what was not measured is None."""
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
