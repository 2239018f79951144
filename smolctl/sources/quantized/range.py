"""Whether a storage format can represent a matrix: scales and offsets are float16, from 6e-8 to 65,504."""

from __future__ import annotations

import torch
from torch import Tensor

from smolctl.sources.quantized.packed import BLOCK

# Steps from one end of a group's range to the other for formats with an offset at the lower end, and from 0
# to the largest absolute value for formats without.
STEPS_WITH_OFFSET = {"int4": 15, "q4_1": 15, "q5_1": 31}
STEPS = {"int8": 127, "q8_0": 127, "q5_0": 16, "q4_0": 8}
PLAIN = {"f16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
# Permitted error of rounding scales and offsets to float16, or values to 16 bits, as a share of a matrix's
# largest value. In range, the error is at most a thousandth (bfloat16: 4).
TOLERANCE = 0.01


def holds(kind: str, matrix: Tensor, group: int = BLOCK) -> bool:
    """Whether values, scales and offsets of a matrix are in the range of a storage format.

    They may be so large that they become infinite, or so small that the matrix becomes 0.

    Args:
        kind: int8 or int4, a GGUF block type, f16, bf16 or bfloat16; every other format can represent all
            values.
        matrix: (rows, columns), finite.
        group: columns that share a scale.
    """
    if kind in PLAIN:
        error = (matrix.to(PLAIN[kind]).float() - matrix).abs()
    elif kind in STEPS or kind in STEPS_WITH_OFFSET:
        low, high = _ranges(matrix, group)
        if kind in STEPS:
            error = STEPS[kind] * _lost(torch.maximum(high, -low) / STEPS[kind])
        else:
            steps = STEPS_WITH_OFFSET[kind]
            error = steps * _lost((high - low) / steps) + _lost(low)
    else:
        return True
    return bool((error <= TOLERANCE * matrix.abs().max()).all())  # false for NaN


def _ranges(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of every group, (rows, groups) each; the last group may be
    shorter.
    """
    whole = matrix.shape[1] // group * group
    parts = [matrix[:, :whole].unflatten(1, (-1, group))] if whole else []
    parts += [matrix[:, None, whole:]] if whole < matrix.shape[1] else []
    low, high = zip(*(part.aminmax(dim=-1) for part in parts), strict=True)
    return torch.cat(low, 1), torch.cat(high, 1)


def _lost(values: Tensor) -> Tensor:
    """The error of rounding them to float16."""
    return (values.half().float() - values).abs()
