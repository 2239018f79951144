"""Whether what came out is right: a fast wrong answer must not win."""

from __future__ import annotations

from torch import Tensor

# Logits may differ by this share of their own spread: the root of the mean square of the differences over
# that of the expected row around its mean, in the worst row. A network with wrong positions, a swapped pair
# of matrices or mixed-up sequences is off by about 1. Measured on the real SmolLM2-135M-Instruct, this
# toolkit and llama.cpp: float32 2e-6, bfloat16 0.01, int8 and q8_0 0.05, q4_1 0.04 where the weights were
# q4_1 before (rounding others to 4 bits costs several times as much), int8-dynamic 0.49.
LARGEST_ERROR = {4: 0.5, 8: 0.2, 16: 0.05, 32: 0.005}
LARGEST_DYNAMIC_ERROR = 0.8  # one scale for all activations: `smolctl quantize` says what that costs
LOSS_ERROR = 1e-3  # of a mean loss, relative


def bits_of(precision: str) -> int:
    """The fewest bits that a precision's name speaks of: 4 of "int4 + int8", 8 of "q8_0"."""
    narrow = {"int4": 4, "q4": 4, "int8": 8, "q8": 8, "q5": 4, "bf16": 16, "f16": 16, "float16": 16}
    name = precision.lower()
    return min([bits for part, bits in (narrow | {"bfloat16": 16}).items() if part in name], default=32)


def error_of(kind: str, answer: Tensor, expected: Tensor) -> float:
    """How far an answer is from the expected one; infinite when it has another shape or is not finite.

    Args:
        kind: of the work that it came out of.
        answer: logits (N, V), a mean loss (1,), or numbers that must be equal.
        expected: of the same shape.
    """
    if answer.shape != expected.shape or not answer.isfinite().all():
        return float("inf")
    if kind in ("tokenize", "checkpoint"):
        return float((answer != expected).any())
    if kind == "train":
        return float((answer - expected).abs() / expected.abs())
    wanted = expected - expected.mean(dim=-1, keepdim=True)
    found = answer - answer.mean(dim=-1, keepdim=True)  # a constant changes no probability
    errors = (found - wanted).square().mean(dim=-1).sqrt() / wanted.square().mean(dim=-1).sqrt()
    return float(errors.max())


def allowed_error(kind: str, precision: str) -> float:
    """What `error_of` may be at most."""
    if kind in ("tokenize", "checkpoint"):
        return 0.0
    if kind == "train":
        return LOSS_ERROR
    dynamic = precision == "int8-dynamic"
    return LARGEST_DYNAMIC_ERROR if dynamic else LARGEST_ERROR[bits_of(precision)]
