"""How well models predict text they have not seen: one measure for validation, `quantize` and `compare`."""

from smolctl.evaluation.estimate import (
    Estimate,
    by_document,
    observations,
    ratio_estimate,
    resampled_estimate,
)
from smolctl.evaluation.measure import (
    BitsPerByte,
    bits,
    bits_per_byte,
    mean_loss,
    require_recorded_loss,
    score_tokens,
)

__all__ = [
    "BitsPerByte",
    "Estimate",
    "bits",
    "bits_per_byte",
    "by_document",
    "mean_loss",
    "observations",
    "ratio_estimate",
    "require_recorded_loss",
    "resampled_estimate",
    "score_tokens",
]
