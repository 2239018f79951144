"""The verdict on a variant: what its size gains, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smolctl.errors import UsageError
from smolctl.evaluation import resampled_estimate
from smolctl.quantization.footprint import Footprint
from smolctl.quantization.measure import GreedyDivergence, Quality, Speed
from smolctl.quantization.schemes import GGUF_SCHEMES, PACKED_SCHEMES, SchemeOptions
from smolctl.sources.quantized_folder import DYNAMIC

# Mean KL in nats per token. On SmolLM2-135M, 8 bits in groups of 32 cost 0.004, which is not noticeable; at 1
# the perplexity has tripled.
UNNOTICED, SMALL, LARGE = 0.01, 0.1, 0.5
NOTICED = 1.05  # speed-up


@dataclass(frozen=True)
class Variant:
    """A quantized model with its measurements."""

    scheme: str
    path: str
    bytes: int  # of the weights file
    bits_per_weight: float
    plan: tuple[str, ...]
    quality: Quality | None = None
    speed: Speed | None = None
    divergence: GreedyDivergence | None = None
    footprint: Footprint | None = None
    engine: str = ""
    calibration: Calibration | None = None
    checkpoint: str = ""  # of int8-dynamic: the `_quantized.ckpt` in the folder
    verdict: str = ""
    hint: str = ""  # better options to try; empty if none are needed


@dataclass(frozen=True)
class Calibration:
    """The effect of searching for scales, on text that the search did not use."""

    plain_kl: float
    searched_kl: float

    @property
    def helped(self) -> bool:
        return math.isfinite(self.searched_kl) and not self.plain_kl <= self.searched_kl


@dataclass(frozen=True)
class SourceFacts:
    """The model that was quantized."""

    id: str
    bytes: int  # of its weights as stored
    bits_per_weight: float
    footprint: Footprint | None = None
    engine: str = ""


def judge(variant: Variant, others: Sequence[Variant], source: SourceFacts) -> str:
    """The verdict on a variant compared with its source and the other variants."""
    words = (
        _quality(variant.quality),
        _beaten(variant, others, source),
        _speed(variant.speed),
        _calibration(variant.calibration),
    )
    return "; ".join(filter(None, words)) or "not measured"


def _quality(quality: Quality | None) -> str:
    if quality is None:
        return ""
    kl = quality.kl.mean
    if not math.isfinite(quality.source_bits_per_byte.mean):
        return "broken: the source itself predicts NaN or infinite values"
    if not quality.finite:
        return "broken: it predicts NaN or infinite values"
    if kl < UNNOTICED:
        return "as good as the source"
    amount = "small" if kl < SMALL else "clear" if kl < LARGE else ""
    perplexities = f"perplexity {quality.perplexity:.3g}, the source's {quality.source_perplexity:.3g}"
    if amount and quality.perplexity <= quality.source_perplexity:  # other predictions, but not worse ones
        return f"a {amount} change: KL {kl:.2g}, {perplexities}"
    return f"{f'a {amount} loss' if amount else 'broken'}: {perplexities}"


def _calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return ""
    if not calibration.helped:
        return "searched scales did not help: the plain ones are kept"
    if not math.isfinite(calibration.plain_kl):
        return "searched scales: plain ones predict NaN or infinite values"
    return (
        f"searched scales: {1 - calibration.searched_kl / calibration.plain_kl:.0%} less KL than plain ones"
    )


def advise(variant: Variant, options: SchemeOptions) -> str:
    """What to try if a variant has lost too much; empty if it has not."""
    if variant.quality is None or variant.quality.kl.mean < UNNOTICED:
        return ""
    lossy = not variant.quality.kl.mean < SMALL  # true for NaN as well
    if variant.scheme == DYNAMIC and options.activations == "per-tensor":
        return (
            "--activations per-token --per-row: one scale for all tokens rounds them to the size of the "
            "largest activation; --per-tensor names the layers"
        )
    if variant.scheme == DYNAMIC:
        return "" if options.per_row else "--per-row: a scale for each row of a matrix"
    if variant.scheme == "int4" and not options.calibrate:
        return "--calibrate: better scales at the same size"
    if lossy and variant.scheme in PACKED_SCHEMES:
        more = 8 if variant.scheme == "int4" else 16
        return f"--bits-map down_proj={more}: more bits for the costliest tensors; --per-tensor names them"
    if not lossy or variant.scheme not in GGUF_SCHEMES or variant.scheme.endswith("f16"):
        return ""
    more_bits = "gguf-bf16" if variant.scheme == "gguf-q8_0" else "gguf-q8_0"
    return f"--to {more_bits}: more bits"


def _beaten(variant: Variant, others: Sequence[Variant], source: SourceFacts) -> str:
    """Whether another variant of at most this size predicts more like the source."""
    if variant.quality is None:
        return ""
    if source.bytes <= variant.bytes and variant.quality.kl.mean > 0:
        return "not worth its size: the source is no larger"
    better = [
        other.scheme
        for other in others
        if other is not variant and other.bytes <= variant.bytes and _clearly_closer(other, variant)
    ]
    return f"not worth its size: {better[0]} is better and no larger" if better else ""


def _clearly_closer(one: Variant, other: Variant) -> bool:
    """Whether the KL of one is lower beyond noise, compared by document; never true for NaN."""
    if one.quality is None or other.quality is None:
        return False
    if not (one.quality.finite and other.quality.finite):
        return one.quality.finite
    theirs = other.quality.kl_documents
    gain = resampled_estimate(theirs, np.ones(len(theirs)), one.quality.kl_documents)
    return gain.low is not None and gain.low > 0


def _speed(speed: Speed | None) -> str:
    """Faster or slower only if every turn agrees, and by more than a few per cent."""
    if speed is None:
        return ""
    if speed.speedup.high < 1 and speed.speedup.median < 1 / NOTICED:
        return f"slower: {speed.speedup.median:.2f} × the source's decoding"
    if speed.speedup.low > 1 and speed.speedup.median > NOTICED:
        return f"{speed.speedup.median:.2f} × as fast"
    return "as fast as the source"


@dataclass(frozen=True)
class Gates:
    """Limits that a variant must meet."""

    max_bpb_increase: float | None = None
    max_kl: float | None = None

    def require_checkable(self, measured: bool) -> None:
        """Refuse limits that could never fail.

        Args:
            measured: whether the variants will be measured.

        Raises:
            UsageError: a limit applies to something that is not measured.
        """
        for option, limit in (("--max-bpb-increase", self.max_bpb_increase), ("--max-kl", self.max_kl)):
            if limit is None:
                continue
            if not measured:
                raise UsageError(
                    f"{option} has nothing to check with --no-measure", f"Leave out --no-measure or {option}."
                )

    def broken_by(self, variants: Sequence[Variant]) -> tuple[str, ...]:
        """One line for each limit that a variant exceeds; values that are not finite exceed every limit."""
        lines = []
        for variant in variants:
            quality = variant.quality
            if quality is None:
                continue
            checks = (
                ("bits per byte", quality.delta.mean, self.max_bpb_increase),
                ("mean KL", quality.kl.mean, self.max_kl),
            )
            for name, value, limit in checks:
                if limit is None or (quality.finite and value <= limit):
                    continue
                fault = f"above {limit:g}" if quality.finite else "not finite"
                shown = _plain(value, name == "bits per byte")
                lines.append(f"{variant.scheme}: {name} {shown} is {fault}")
        return tuple(lines)


def _plain(value: float, sign: bool) -> str:
    """Four significant digits without an exponent; with a sign if it is a change."""
    shown = np.format_float_positional(value, 4, fractional=False, trim="-", sign=sign)
    return str(shown) if math.isfinite(value) else f"{value:g}"
