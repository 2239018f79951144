"""Causal attention built from matmuls, for processors on which oneDNN's are much faster than MKL's.

PyTorch's `scaled_dot_product_attention` multiplies with MKL on a CPU. On a Zen 5, the attention of SmolLM2-135M
takes 0.6 of its time here for sequences of 512 tokens, and half for 2,048 (docs/benchmarks.md).

Shapes as in `network.py`; G = H / K query heads share a key/value head. For each sequence and key/value head,
P positions at a time attend to the S positions up to the last of them; their G heads are R = P · G rows of
one matmul.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product as pairs
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from smolctl.model import products
from smolctl.model.products import product

BLOCK_ROWS = 384  # fewer rows take longer to multiply; with more, more of the scores are masked
FEWEST_POSITIONS = 384  # of a sequence; PyTorch's attention is faster for shorter ones


def is_faster(q: Tensor) -> bool:
    """Whether to use this attention instead of PyTorch's for queries (B, T, H, D) on this machine.

    Only in training, where all sequences have one length: oneDNN keeps about half a megabyte for every shape
    that it has multiplied.
    """
    return (
        products.HAS_WIDE_ONEDNN
        and q.requires_grad
        and q.device.type == "cpu"
        and q.dtype == torch.float32
        and q.shape[1] >= FEWEST_POSITIONS
        and not torch.compiler.is_compiling()
    )


def _blocks(groups: Tensor) -> Iterator[slice]:
    """The positions of each block of queries (B, T, K, G, D)."""
    T, most = groups.shape[1], max(1, BLOCK_ROWS // groups.shape[3])
    for start in range(0, T, most):
        yield slice(start, min(start + most, T))


def _causal_mask(groups: Tensor) -> Tensor:
    """What is added to the scores among the positions of a block of queries (B, T, K, G, D): (P, 1, P)."""
    most = max(1, BLOCK_ROWS // groups.shape[3])
    return groups.new_full((most, most), -torch.inf).triu_(1)[:, None]


def _probabilities(rows: Tensor, keys: Tensor, block: slice, mask: Tensor) -> Tensor:
    """The softmax (R, S) of the scores of scaled queries (R, D) with keys (S, D)."""
    scores = product(rows, keys)
    positions = block.stop - block.start
    scores.view(positions, -1, len(keys))[:, :, block].add_(mask[:positions, :, :positions])
    return torch.softmax(scores, dim=1)


class _CausalAttention(Function):
    """Saves queries, keys and values; the probabilities are recomputed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        groups = q.unflatten(2, (k.shape[2], -1))  # (B, T, K, G, D)
        out, mask, scale = torch.empty_like(groups), _causal_mask(groups), q.shape[-1] ** -0.5
        for sequence, head in pairs(range(k.shape[0]), range(k.shape[2])):
            keys, values = k[sequence, :, head].contiguous(), v[sequence, :, head].contiguous()  # (T, D)
            for block in _blocks(groups):
                rows = (groups[sequence, block, head] * scale).flatten(0, 1)
                chosen = _probabilities(rows, keys[: block.stop], block, mask)
                out[sequence, block, head] = product(chosen, values[: block.stop].mT).view(-1, *out.shape[3:])
        return out.flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        groups, dout = (x.unflatten(2, (k.shape[2], -1)) for x in (q, gradient))  # (B, T, K, G, D)
        dq, dk, dv = torch.empty_like(groups), torch.empty_like(k), torch.empty_like(v)
        mask, scale = _causal_mask(groups), q.shape[-1] ** -0.5
        for sequence, head in pairs(range(k.shape[0]), range(k.shape[2])):
            keys, values = k[sequence, :, head].contiguous(), v[sequence, :, head].contiguous()  # (T, D)
            # Transposed, because oneDNN copies the first matrix of a matmul if that is transposed, and the
            # second matrix is the larger one in this order.
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
                dq[sequence, block, head] = (
                    product(dscores, keys[seen].mT).mul_(scale).view(-1, *dq.shape[3:])
                )
            dk[sequence, :, head], dv[sequence, :, head] = dkeys.mT, dvalues.mT
        return dq.flatten(2, 3), dk, dv


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries (B, T, H, D) to keys and values (B, T, K, D) up to their position: (B, T, H, D)."""
    return _CausalAttention.apply(q, k, v)  # type: ignore[no-any-return, no-untyped-call]
