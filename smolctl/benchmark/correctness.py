"""Whether an output is correct: a fast engine with wrong results must not win."""

from __future__ import annotations

from torch import Tensor

# Logits may differ by this share of their own spread: the root mean square of the differences, divided by
# that of the expected row around its mean, in the worst row. A network with wrong positions, a swapped pair
# of matrices or mixed-up sequences is off by about 1. Measured with SmolLM2-135M-Instruct on smolctl and
# llama.cpp: float32 2e-6, bfloat16 0.01, int8 and q8_0 0.05, q4_1 0.04 for weights that were in q4_1 before
# (rounding other weights to 4 bits costs several times as much), int8-dynamic 0.49.
LARGEST_ERROR = {4: 0.5, 8: 0.2, 16: 0.05, 32: 0.005}
LARGEST_DYNAMIC_ERROR = 0.8  # one scale for all activations: `smolctl quantize` reports what that costs
LOSS_ERROR = 1e-3  # relative error of a mean loss


def bits_of(precision: str) -> int:
    """The fewest bits that a precision's name contains: 4 in "int4 + int8", 8 in "q8_0"."""
    narrow = {"int4": 4, "q4": 4, "int5": 4, "q5": 4, "int8": 8, "q8": 8, "f16": 16, "float16": 16}
    return min([bits for name, bits in narrow.items() if name in precision.lower()], default=32)


def error_of(suite: str, output: Tensor, expected: Tensor) -> float:
    """How far an output is from the expected one; infinite if it has another shape or is not finite.

    Args:
        suite: the suite that produced the output.
        output: logits (N, V), a mean loss (1,), or numbers that must be equal.
        expected: the expected output, of the same shape.
    """
    if output.shape != expected.shape or not output.isfinite().all():
        return float("inf")
    if suite in ("tokenize", "checkpoint"):
        return float((output != expected).any())
    if suite == "train":
        return float((output - expected).abs() / expected.abs())
    wanted = expected - expected.mean(dim=-1, keepdim=True)
    found = output - output.mean(dim=-1, keepdim=True)  # a constant offset changes no probability
    errors = (found - wanted).square().mean(dim=-1).sqrt() / wanted.square().mean(dim=-1).sqrt()
    return float(errors.max())


def allowed_error(suite: str, precision: str) -> float:
    """The largest `error_of` that counts as correct."""
    if suite in ("tokenize", "checkpoint"):
        return 0.0
    if suite == "train":
        return LOSS_ERROR
    dynamic = precision == "int8-dynamic"
    return LARGEST_DYNAMIC_ERROR if dynamic else LARGEST_ERROR[bits_of(precision)]
