"""The network's own operations, with gradients written by hand.

Autograd keeps every intermediate result for the backward pass. These keep what cannot be had again
cheaply and compute the rest anew, in place where they can: less memory, and less traffic with it.

All of them compute in the dtype of their inputs, so they work under autocast, where the products before
them return bfloat16. Shapes as in `network.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


class _RMSNorm(Function):
    """Keeps the input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (…, 1)
        scale = norm.square().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (x * scale).to(x.dtype)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = gradient * normed
        rows = product.flatten(0, -2)
        # What the step along x takes away again, as scaling x changes nothing: its share in every row.
        share = (rows @ weight.to(rows.dtype)).view_as(scale).div_(x.shape[-1])
        dx = (gradient * weight).addcmul_(normed, share, value=-1).mul_(scale)
        return dx.to(x.dtype), rows.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) × weight over the last dimension; the mean of squares in float32."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    out_left, out_right = out.chunk(2, dim=-1)
    torch.mul(left, cos, out=out_left).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=out_right).addcmul_(left, sin)
    return out


class _Rotate(Function):
    """Keeps nothing of its input: the gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None, None


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn queries or keys (B, T, H, D) by the angles whose cos and sin are (2, T, 1, D/2).

    The two halves of a head turn together ("rotate half"), as in Hugging Face's Llama.
    """
    cos, sin = rotary.to(x.dtype)
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _SwiGLULinear(Function):
    """Keeps gate and up; the activated product, as large as each, is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight.to(gate.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        product = activated * up
        dweight = gradient.flatten(0, -2).mT @ product.flatten(0, -2)
        dproduct = gradient @ weight.to(gradient.dtype)
        dup = torch.mul(dproduct, activated, out=product)
        dgate = torch.ops.aten.silu_backward(dproduct.mul_(up), gate)
        return dgate, dup, dweight.to(weight.dtype)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) × up) @ weightᵀ: gate and up are (B, T, F), weight is (C, F), the result (B, T, C)."""
    return _SwiGLULinear.apply(gate, up, weight)  # type: ignore[no-any-return, no-untyped-call]


class _LinearCrossEntropy(Function):
    """The gradients are computed chunk by chunk together with the loss: no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, rows: int
    ) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden) if needs_gradient else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient else None
        matrix = weight.to(hidden.dtype)
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], targets[start : start + rows, None]
            logits = F.linear(part, matrix).float()  # (rows, V)
            chosen = logits.gather(1, target)
            largest = logits.amax(1, keepdim=True)
            probabilities = torch.softmax(logits, dim=1, out=logits)
            # The most likely token has at least 1/V, so that its logarithm is exact enough for all.
            logsumexp = largest - probabilities.amax(1, keepdim=True).log_()
            total += (logsumexp - chosen + z_loss * logsumexp.square()).sum()
            if dhidden is None or dweight is None:
                continue
            if z_loss:
                probabilities.mul_(1 + 2 * z_loss * logsumexp)
            probabilities.scatter_add_(1, target, torch.full_like(chosen, -1))
            dlogits = probabilities.to(hidden.dtype)
            torch.mm(dlogits, matrix, out=dhidden[start : start + rows])
            if dlogits.dtype == torch.float32:
                dweight.addmm_(dlogits.mT, part)
            else:
                dweight += dlogits.mT @ part
        ctx.dtype = weight.dtype
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        return dhidden * gradient, (dweight * gradient).to(ctx.dtype), None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, z_loss: float = 0.0
) -> Tensor:
    """Sum over tokens of the cross entropy in nats, (), in float32.

    Args:
        hidden: (N, C).
        weight: of the head, (V, C).
        targets: (N,).
        rows: tokens whose logits exist at once.
        z_loss: weight of logsumexp², which holds the logits near 0 (Chowdhery et al., "PaLM", 2022: 1e-4).
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, rows)  # type: ignore[no-any-return, no-untyped-call]
