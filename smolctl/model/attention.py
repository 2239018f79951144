"""Causal attention built from matmuls, for processors on which oneDNN's are much faster than MKL's.

PyTorch's `scaled_dot_product_attention` multiplies with MKL on a CPU. On a Zen 5, the attention of
SmolLM2-135M takes 0.6 of its time here for sequences of 512 tokens, and half for 2,048 (docs/benchmarks.md).

Shapes as in `network.py`; G = H / K query heads share a key/value head. For each sequence and key/value head,
P positions at a time attend to the S positions up to the last of them; their G heads are R = P · G rows of
one matmul.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from smolctl.model.products import multiplies_fast, product

BLOCK_ROWS = 384  # fewer rows take longer to multiply; with more, more of the scores are masked
FEWEST_POSITIONS = 384  # of a sequence; PyTorch's attention is faster for shorter ones


def is_faster(x: Tensor) -> bool:
    """Whether to use this attention instead of PyTorch's for hidden states x (B, T, C) on this machine.

    Only in training, where all sequences have one length: oneDNN keeps about half a megabyte for every shape
    that it has multiplied.
    """
    is_float32 = multiplies_fast(x) and not torch.is_autocast_enabled("cpu")
    return is_float32 and x.requires_grad and x.shape[1] >= FEWEST_POSITIONS


def _blocks(groups: Tensor) -> Iterator[slice]:
    """The positions of each block of queries (B, T, K, G, D)."""
    T, most = groups.shape[1], _positions_at_a_time(groups)
    for start in range(0, T, most):
        yield slice(start, min(start + most, T))


def _causal_mask(groups: Tensor) -> Tensor:
    """What is added to the scores among the positions of a block of queries (B, T, K, G, D): (P, 1, P)."""
    most = _positions_at_a_time(groups)
    return groups.new_full((most, most), -torch.inf).triu_(1)[:, None]


def _positions_at_a_time(groups: Tensor) -> int:
    """P for queries (B, T, K, G, D)."""
    return max(1, BLOCK_ROWS // groups.shape[3])


def _probabilities(rows: Tensor, keys: Tensor, block: slice, mask: Tensor) -> Tensor:
    """The softmax (R, S) of the scores of scaled queries (R, D) with keys (S, D)."""
    scores = product(rows, keys)
    positions = block.stop - block.start
    scores.view(positions, -1, len(keys))[:, :, block].add_(mask[:positions, :, :positions])
    return torch.softmax(scores, dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Write to `out` (B, T, H, D) the attention of queries (B, T, H, D) to keys and values (B, T, K, D) up to
    their position.
    """
    groups, out = (x.unflatten(2, (k.shape[2], -1)) for x in (q, out))  # (B, T, K, G, D)
    mask, scale = _causal_mask(groups), q.shape[-1] ** -0.5
    for sequence, head in itertools.product(range(k.shape[0]), range(k.shape[2])):
        keys, values = k[sequence, :, head].contiguous(), v[sequence, :, head].contiguous()  # (T, D)
        for block in _blocks(groups):
            rows = (groups[sequence, block, head] * scale).flatten(0, 1)
            chosen = _probabilities(rows, keys[: block.stop], block, mask)
            out[sequence, block, head] = product(chosen, values[: block.stop].mT).view(-1, *out.shape[3:])


def _attend_backward(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, if the result of `_attend` has this gradient (B, T, H, D).

    The probabilities are recomputed.
    """
    groups, dout = (x.unflatten(2, (k.shape[2], -1)) for x in (q, gradient))  # (B, T, K, G, D)
    dq, dk, dv = torch.empty_like(groups), torch.empty_like(k), torch.empty_like(v)
    mask, scale = _causal_mask(groups), q.shape[-1] ** -0.5
    for sequence, head in itertools.product(range(k.shape[0]), range(k.shape[2])):
        keys, values = k[sequence, :, head].contiguous(), v[sequence, :, head].contiguous()  # (T, D)
        # Transposed, because oneDNN copies the first matrix of a matmul if that is transposed, and the second
        # one is larger in this order.
        dkeys, dvalues = keys.new_zeros(2, *keys.mT.shape)  # (D, T)
        for block in _blocks(groups):
            seen = slice(block.stop)
            rows = (groups[sequence, block, head] * scale).flatten(0, 1)
            drows = dout[sequence, block, head].flatten(0, 1)
            chosen = _probabilities(rows, keys[seen], block, mask)
            dchosen = product(drows, values[seen])
            dscores = torch._softmax_backward_data(dchosen, chosen, 1, chosen.dtype)  # (R, S)
            dvalues[:, seen] += product(drows.mT, chosen.mT)
            dkeys[:, seen] += product(rows.mT, dscores.mT)
            dq[sequence, block, head] = product(dscores, keys[seen].mT).mul_(scale).view(-1, *dq.shape[3:])
        dk[sequence, :, head], dv[sequence, :, head] = dkeys.mT, dvalues.mT
    return dq.flatten(2, 3), dk, dv


Projections = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class _CausalAttention(Function):
    """Saves hidden states only; queries, keys and values are recomputed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, project: Projections, heads: tuple[int, int], *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.project = project
        out = x.new_empty(*x.shape[:2], *heads)  # before temporary tensors, as in `functional.swiglu`
        _attend(*project(x), out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            q, k, v = ctx.project(x)
        with torch.no_grad():
            gradients = _attend_backward(q, k, v, gradient)
        dx, *dparameters = torch.autograd.grad((q, k, v), (x, *parameters), gradients)
        return dx, None, None, *dparameters


def causal_attention(
    x: Tensor, heads: tuple[int, int], project: Projections, parameters: Sequence[Tensor]
) -> Tensor:
    """Attention of every token to those up to itself.

    Args:
        x: hidden states (B, T, C).
        heads: H and D.
        project: computes queries (B, T, H, D), keys and values (B, T, K, D) from x; always the same ones.
        parameters: the tensors with gradients that it uses.

    Returns:
        (B, T, H, D).
    """
    return _CausalAttention.apply(x, project, heads, *parameters)  # type: ignore[no-any-return, no-untyped-call]
