"""Quantizes matrices to small integers, with plain or with searched scales.

A group of columns of one row shares a scale (and, with 4 bits, an offset); see `sources/quantized/packed.py`.
Scales are float16, and values are rounded against the stored scale, so that its rounding error is not added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smolctl.sources.quantized.packed import VALUES_AT_ONCE, PackedMatrix, pack_integers

# A float32 near 1.5 × 2²³ has no fractional bits: adding and subtracting it rounds, half to even. `round_`
# does the same, but wakes torch's threads even for small tensors.
ROUNDS = 1.5 * 2**23
SMALLEST = 2**-24  # the smallest float16 above 0
# Shares of a group's range that the search tries as the range of the scale.
SHRINKS_8 = tuple(1 - step * 0.01 for step in range(0, 12))
SHRINKS_4 = tuple(1.06 - step * 0.03 for step in range(0, 16))


def quantize_matrix(weight: Tensor, bits: int, group: int, importance: Tensor | None = None) -> PackedMatrix:
    """Quantize a matrix to packed integers.

    Args:
        weight: (rows, columns), any float type.
        bits: 8 or 4.
        group: columns that share a scale, a multiple of 32.
        importance: (columns,) mean square of each column's input; with it, scales are searched for that
            minimize the squared error of the output.
    """
    columns = weight.shape[1]
    parts = [
        _quantize_rows(part.float(), bits, group, importance)
        for part in weight.split(max(1, VALUES_AT_ONCE // columns))  # each (rows, columns)
    ]
    values, scales, offsets = zip(*parts, strict=True)
    return PackedMatrix(
        bits,
        columns,
        group,
        pack_integers(torch.cat(values)[:, :columns].numpy(), bits),
        torch.cat(scales).numpy(),
        torch.cat(offsets).numpy() if bits == 4 else None,
    )


def _quantize_rows(
    weight: Tensor, bits: int, group: int, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(values (rows, P), scales (rows, groups), offsets (rows, groups)) of one part."""
    rows, columns = weight.shape
    grouped = _grouped(weight, group)  # (rows, groups, group)
    used = _grouped(torch.ones(1, columns), group)  # 0 for padding
    low = grouped.where(used > 0, torch.inf).amin(-1)
    high = grouped.where(used > 0, -torch.inf).amax(-1)
    if importance is None:
        scales, offsets = _plain(low, high, bits)
    else:
        weights = _grouped(importance.float()[None], group) + used * importance.float().mean() * 1e-3
        scales, offsets = _searched(grouped, weights, low, high, bits)
    values = _round(grouped, scales, offsets, bits)
    return values.view(rows, -1), scales.half(), offsets.half()


def _grouped(matrix: Tensor, group: int) -> Tensor:
    """(rows, columns) as (rows, groups, group), zero-padded."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % group))
    return padded.view(matrix.shape[0], -1, group)


def _stored(scales: Tensor) -> Tensor:
    """Scales as stored in float16; one that would become 0 gets the smallest positive value."""
    return scales.clamp(max=65_504).half().float().clamp(min=SMALLEST)


def _plain(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets that cover exactly the range of every group."""
    if bits == 8:
        return _stored(torch.maximum(high, -low) / 127), torch.zeros_like(low)
    offsets = low.half().float()
    return _stored((high - offsets) / 15), offsets


def _round(grouped: Tensor, scales: Tensor, offsets: Tensor, bits: int) -> Tensor:
    values = (grouped - offsets[..., None]).div_(scales[..., None])
    values = values.clamp_(-127, 127) if bits == 8 else values.clamp_(0, 15)
    return values.add_(ROUNDS).sub_(ROUNDS)


def _searched(
    grouped: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """The tried scales and offsets with the least weighted squared error.

    For every candidate range, values are rounded, and then scale and offset are solved for by least squares
    with the values fixed, rounded to float16. The plain ones are among the candidates, so the result is never
    worse.
    """
    best_scales, best_offsets = _plain(low, high, bits)
    best = _error(grouped, weights, best_scales, best_offsets, bits)
    for shrink in SHRINKS_8 if bits == 8 else SHRINKS_4:
        if bits == 8:
            scales, offsets = _stored(torch.maximum(high, -low) * shrink / 127), torch.zeros_like(low)
        else:
            middle, half = (high + low) / 2, (high - low) / 2 * shrink
            offsets = (middle - half).half().float()
            scales = _stored(2 * half / 15)
        for _ in range(2):
            values = _round(grouped, scales, offsets, bits)
            scales, offsets = _least_squares(grouped, weights, values, scales, offsets, bits)
            error = _error(grouped, weights, scales, offsets, bits)
            better = error < best
            best = best.where(~better, error)
            best_scales = best_scales.where(~better, scales)
            best_offsets = best_offsets.where(~better, offsets)
    return best_scales, best_offsets


def _error(grouped: Tensor, weights: Tensor, scales: Tensor, offsets: Tensor, bits: int) -> Tensor:
    """Weighted squared error of every group, (rows, groups)."""
    values = _round(grouped, scales, offsets, bits)
    missed = values.mul_(scales[..., None]).add_(offsets[..., None]).sub_(grouped)
    return missed.square_().mul_(weights).sum(-1)


def _least_squares(
    grouped: Tensor, weights: Tensor, values: Tensor, scales: Tensor, offsets: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Least-squares scale and offset for fixed values; the given ones if the problem has no unique
    solution.
    """
    weighted = weights * values
    squares, product = (weighted * values).sum(-1), (weighted * grouped).sum(-1)
    if bits == 8:
        solved = product / squares
        return _stored(solved.where(squares > 0, scales)), offsets
    total = weights.sum(-1).expand_as(squares)
    first, target = weighted.sum(-1), (weights * grouped).sum(-1)
    determinant = total * squares - first.square()
    found = determinant > 1e-12 * total * squares
    solved = _stored(((total * product - first * target) / determinant).where(found, scales).clamp(min=0))
    shift = ((target - solved * first) / total).half().float()
    return solved, shift.where(found, offsets)
