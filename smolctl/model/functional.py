"""The network's fused operations, with hand-written gradients.

Autograd saves every intermediate result for the backward pass. These operations save only what is expensive
to recompute, and recompute the rest, in place where possible: this takes less memory and less memory traffic.

Under autocast, matmuls are computed in autocast's dtype, and everything else in the dtype of its input.
Shapes as in `network.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from smolctl.model.products import (
    add_product,
    add_weight_gradient,
    multiplies_fast,
    product,
    row_chunks,
    weight_gradient,
)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matmuls with x are computed."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Linear(Function):
    """A matmul that saves its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sum: Tensor | None) -> Tensor:
        dtype = _product_dtype(x)
        ctx.dtype, x = x.dtype, x.to(dtype)
        ctx.save_for_backward(x, weight)
        matrix = weight.to(dtype)
        return product(x, matrix) if sum is None else add_product(sum, x, matrix)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        dsum = gradient if ctx.needs_input_grad[2] else None
        gradient = gradient.to(x.dtype)
        dx = product(gradient, weight.to(x.dtype).mT)
        return dx.to(ctx.dtype), weight_gradient(gradient, x).to(weight.dtype), dsum


def linear(x: Tensor, weight: Tensor, sum: Tensor | None = None) -> Tensor:
    """x @ weightᵀ, plus `sum` if there is one: x is (…, I), weight (O, I), the result and `sum` (…, O)."""
    return _Linear.apply(x, weight, sum)  # type: ignore[no-any-return, no-untyped-call]


def _rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x) of every row, (…, 1) in float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale: Tensor = norm.square().div_(x.shape[-1]).add_(eps).rsqrt_()
    return scale


def _rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, normed: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; `normed` is x × scale."""
    rows = (gradient * normed).flatten(0, -2)
    # Remove the component along x, because scaling x does not change the output: its share of every row.
    if torch.compiler.is_compiling():  # which fuses a sum with the operations after it, but not a matmul
        share = (gradient * normed * weight).mean(-1, keepdim=True)
    else:
        share = (rows @ weight.to(rows.dtype)).view_as(scale).div_(x.shape[-1])
    dx = (gradient * weight).addcmul_(normed, share, value=-1).mul_(scale)
    return dx.to(x.dtype), rows.sum(0).to(weight.dtype)


class _RMSNorm(Function):
    """Saves the input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _rms_scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (x * scale).to(x.dtype)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        return *_rms_norm_backward(gradient, x, weight, scale, x * scale), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) × weight over the last dimension; the mean of squares in float32."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def _linears_backward(
    inputs: Tensor, gradients: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the inputs (…, I) and of the weights (O, I) of matmuls whose outputs have `gradients`."""
    dinputs: Tensor | None = None
    dweights = []
    for gradient, weight in zip(gradients, weights, strict=True):
        dweights.append(weight_gradient(gradient, inputs).to(weight.dtype))
        matrix = weight.to(inputs.dtype).mT
        dinputs = product(gradient, matrix) if dinputs is None else add_product(dinputs, gradient, matrix)
    assert dinputs is not None
    return dinputs, dweights


class _RMSNormLinears(Function):
    """Saves only x, which the residual stream keeps anyway; the input of the matmuls is recomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        scale = _rms_scale(x, eps)
        ctx.save_for_backward(x, norm, scale, *weights)
        dtype = _product_dtype(x)
        normed = (x * scale).to(x.dtype).mul_(norm).to(dtype)
        return tuple(product(normed, weight.to(dtype)) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, scale, *weights = ctx.saved_tensors
        dtype = gradients[0].dtype
        normed = x * scale
        inputs = (normed * norm).to(dtype)
        dinputs, dweights = _linears_backward(inputs, gradients, weights)
        return *_rms_norm_backward(dinputs.to(x.dtype), x, norm, scale, normed), None, *dweights


def rms_norm_linears(x: Tensor, norm: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
    """rms_norm(x, norm, eps) times several matrices: (…, I) with (O, I) gives (…, O)."""
    return _RMSNormLinears.apply(x, norm, eps, *weights)  # type: ignore[no-any-return, no-untyped-call]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # which fuses them, and cannot write to parts of a tensor
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    out = torch.empty_like(x)
    out_left, out_right = out.chunk(2, dim=-1)
    torch.mul(left, cos, out=out_left).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=out_right).addcmul_(left, sin)
    return out


class _Rotate(Function):
    """Saves none of its inputs: the gradient is rotated back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None, None


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate queries or keys (B, T, H, D) by the angles whose cos and sin are (2, T, 1, D/2).

    The two halves of a head form the pairs ("rotate half"), as in Hugging Face's Llama.
    """
    cos, sin = rotary.to(x.dtype)
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


SMALLEST_RECOMPUTED = 512  # hidden size; a smaller model takes little memory, and 7 % more time otherwise


def recomputes_swiglu(x: Tensor) -> bool:
    """Whether `swiglu` computes gate and up of x (…, C) again in the backward pass instead of saving them."""
    return multiplies_fast(x) and x.shape[-1] >= SMALLEST_RECOMPUTED


class _SwiGLU(Function):
    """Saves x, and the outputs of gate and up unless they are recomputed, as everything else is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, scale: float, gate: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        dtype = _product_dtype(x)
        # The result is allocated before temporary tensors, which then leave no gap when they are freed.
        out = None if torch.compiler.is_compiling() else torch.empty_like(x)
        rms = _rms_scale(x, eps)
        normed = (x * rms).to(x.dtype) if out is None else torch.mul(x, rms, out=out)
        inputs = normed.mul_(norm).to(dtype)
        gated, upped = product(inputs, gate.to(dtype)), product(inputs, up.to(dtype))  # (B, T, F)
        y = product(F.silu(gated).mul_(upped), down.to(dtype))
        ctx.scale = scale
        kept = (None, None) if recomputes_swiglu(x) else (gated, upped)
        ctx.dtype = dtype
        ctx.save_for_backward(x, norm, rms, *kept, gate, up, down)
        return torch.add(x, y, alpha=scale, out=out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, rms, gated, upped, gate, up, down = ctx.saved_tensors
        dtype = ctx.dtype
        normed = x * rms
        inputs = (normed * norm).to(dtype)
        if gated is None:
            gated, upped = product(inputs, gate.to(dtype)), product(inputs, up.to(dtype))
        dy = (gradient if ctx.scale == 1 else gradient * ctx.scale).to(dtype)
        activated = F.silu(gated)
        hidden = activated * upped
        ddown = weight_gradient(dy, hidden)
        dhidden = product(dy, down.to(dtype).mT)
        dupped = torch.mul(dhidden, activated, out=hidden)
        dgated = torch.ops.aten.silu_backward(dhidden.mul_(upped), gated)
        del activated, dhidden, upped  # memory use is highest here, in the last layer
        dinputs, dweights = _linears_backward(inputs, (dgated, dupped), (gate, up))
        dx, dnorm = _rms_norm_backward(dinputs.to(x.dtype), x, norm, rms, normed)
        return dx + gradient, dnorm, None, None, *dweights, ddown.to(down.dtype)


def swiglu(
    x: Tensor, norm: Tensor, eps: float, scale: float, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """x + scale × (silu(n @ gateᵀ) × (n @ upᵀ)) @ downᵀ with n = rms_norm(x, norm, eps).

    x and the result are (B, T, C); gate and up are (F, C), down is (C, F).
    """
    return _SwiGLU.apply(x, norm, eps, scale, gate, up, down)  # type: ignore[no-any-return, no-untyped-call]


ChunkLosses = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def _losses(logits: Tensor, target: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient of a chunk of logits (rows, V), which is overwritten, with targets (rows, 1).

    Returns:
        The sum of cross entropy and z-loss, the sum of the z-loss, and the gradient (rows, V) of the first.
    """
    exact = logits.float()
    chosen = exact.gather(1, target)
    largest = exact.amax(1, keepdim=True)
    probabilities = torch.softmax(exact, dim=1, out=exact)
    # The most likely token has a probability of at least 1/V, so its logarithm is accurate.
    logsumexp = largest - probabilities.amax(1, keepdim=True).log_()
    z_losses = z_loss * logsumexp.square()
    if z_loss:
        probabilities.mul_(1 + 2 * z_loss * logsumexp)
    probabilities.scatter_add_(1, target, torch.full_like(chosen, -1))
    return (logsumexp - chosen + z_losses).sum(), z_losses.sum(), probabilities.to(logits.dtype)


def _fusable_losses(logits: Tensor, target: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """`_losses` for torch.compile, which then reads the logits twice and nothing else of their size."""
    exact = logits.float()
    logsumexp = exact.logsumexp(1, keepdim=True)  # (rows, 1)
    z_losses = z_loss * logsumexp.square()
    probabilities = (exact - logsumexp).exp() * (1 + 2 * z_loss * logsumexp)
    is_target = torch.arange(logits.shape[1], device=logits.device) == target  # (rows, V)
    losses = logsumexp - exact.gather(1, target) + z_losses
    return losses.sum(), z_losses.sum(), (probabilities - is_target.float()).to(logits.dtype)


@cache
def _compiled_losses() -> ChunkLosses:
    return torch.compile(_fusable_losses)


class _TiedEmbedding(Function):
    """Adds the gradient of the embedding to that of the head, so the table has one gradient of its size."""

    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(input_ids)
        return F.embedding(input_ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, dhead: Tensor) -> tuple[None, Tensor]:
        (input_ids,) = ctx.saved_tensors
        return None, dhead.index_add_(0, input_ids.flatten(), gradient.flatten(0, 1).to(dhead.dtype))


def tied_embedding(input_ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (B, T, C) of a table (V, C) for tokens (B, T), and the table as the weight of the head."""
    return _TiedEmbedding.apply(input_ids, table)  # type: ignore[no-any-return, no-untyped-call]


class _LinearCrossEntropy(Function):
    """Computes the gradients chunk by chunk together with the loss, so no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, rows: int, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        needs_gradient = any(ctx.needs_input_grad[:2])
        total, z_total = torch.zeros((2,), dtype=torch.float32, device=hidden.device).unbind()
        dhidden = torch.empty_like(hidden) if needs_gradient else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient else None
        dtype = _product_dtype(hidden)
        matrix = weight.to(dtype)
        compute = _compiled_losses() if compiled else _losses
        for chunk in row_chunks(hidden, rows):
            part, target = hidden[chunk].to(dtype), targets[chunk, None]
            losses, z_losses, dlogits = compute(product(part, matrix), target, z_loss)
            total += losses
            z_total += z_losses
            if dhidden is None or dweight is None:
                continue
            dhidden[chunk] = product(dlogits, matrix.mT)
            add_weight_gradient(dweight, dlogits, part)
            del dlogits  # before the next chunk's, because memory use is highest here
        ctx.dtype = weight.dtype
        ctx.save_for_backward(dhidden, dweight)
        ctx.mark_non_differentiable(z_total)
        return total, z_total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        # In place, because memory use is highest here. PyTorch counts changes to saved tensors, so a second
        # backward pass over the same loss fails instead of multiplying again.
        return dhidden.mul_(gradient), dweight.mul_(gradient).to(ctx.dtype), None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: int,
    z_loss: float = 0.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the cross entropy and the z-loss in nats, (), in float32.

    Args:
        hidden: (N, C).
        weight: of the head, (V, C).
        targets: (N,).
        rows: tokens whose logits exist at the same time.
        z_loss: weight of logsumexp², which keeps the logits near 0 (Chowdhery et al., "PaLM", 2022: 1e-4).
        compiled: whether torch.compile fuses the operations on the logits.

    Returns:
        The sum of both, and its z-loss part, which has no gradient of its own.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, rows, compiled)  # type: ignore[no-any-return, no-untyped-call]
