"""A block of the network: attention and MLP, each after a norm and added to the residual stream.

Shapes as in `network.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolctl.config import ModelConfig
from smolctl.model import attention
from smolctl.model.documents import Attended, has_kernels
from smolctl.model.functional import rotate, swiglu
from smolctl.model.layers import RMSNorm, add_linear, is_plain, linear_layer, normed_linears

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# `KVCache.append` of one layer.
Append = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share one key/value head.

    Its result, times `residual_scale`, is added to its input, as in `MLP`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.residual_scale = config.residual_scale
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = linear_layer(config.hidden_size, queries, config.qkv_bias)
        self.k_proj = linear_layer(config.hidden_size, keys, config.qkv_bias)
        self.v_proj = linear_layer(config.hidden_size, keys, config.qkv_bias)
        self.o_proj = linear_layer(queries, config.hidden_size)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.use_qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        rotary: Tensor | None,
        append: Append | None,
        attended: Attended | None = None,
    ) -> Tensor:
        project = partial(self._project, norm=norm, rotary=rotary)
        if attended is None and append is None and self._recomputes(x):
            heads = (self.q_proj.out_features // self.head_dim, self.head_dim)
            y = attention.causal_attention(x, heads, project, self._projections(norm))
        else:
            y = self._attention(*project(x), append, attended)
        return add_linear(x, self.o_proj, y.flatten(2), self.residual_scale)  # (B, T, C)

    def _project(self, x: Tensor, norm: RMSNorm, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, T, H, D) and keys, and values (B, T, K, D), of hidden states (B, T, C)."""
        q, k, v = (
            projected.unflatten(2, (-1, self.head_dim))
            for projected in normed_linears(x, norm, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def _recomputes(self, x: Tensor) -> bool:
        """Whether `attention.py` computes the attention of hidden states x, and `_project` twice."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return attention.is_faster(x) and all(map(is_plain, layers)) and not self._dropped

    @property
    def _dropped(self) -> float:
        """The share of the attention that is dropped now."""
        return self.dropout if self.training else 0.0

    def _projections(self, norm: RMSNorm) -> list[nn.Parameter]:
        """The trained tensors that `_project` uses."""
        parts = (norm, self.q_proj, self.k_proj, self.v_proj, self.q_norm, self.k_norm)
        tensors = chain.from_iterable(part.parameters() for part in parts if part is not None)
        return [tensor for tensor in tensors if tensor.requires_grad]

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, append: Append | None, attended: Attended | None
    ) -> Tensor:
        """Attention of queries (B, T, H, D) to keys and values (B, T, K, D) as `attended` says."""
        if attended is None or isinstance(attended, Tensor):
            return self._attend(q, k, v, append, attended)
        if isinstance(attended, tuple):
            apart = self._attend_apart(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attended)
            return apart.view_as(q)
        return self._attend_in_blocks(q, k, v, attended)

    def _attend_in_blocks(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
        """FlexAttention of queries (B, T, H, D) to keys and values (B, T, K, D): (B, T, H, D).

        Its kernels add up in a fixed order, as an exact resume needs. FlashAttention's do so as well, but
        that takes them twice the time (docs/benchmarks.md).
        """
        from torch.nn.attention.flex_attention import flex_attention

        # RoPE computes in float32.
        q, k, v = q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2), v.transpose(1, 2)
        y = flex_attention(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2)

    def _attend_apart(self, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Attention of queries (N, H, D) to keys and values (N, K, D) of their own document: (N, H, D)."""
        if has_kernels(v) and not self._dropped:
            from torch.nn.attention.varlen import varlen_attn  # takes a second to import

            begins = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=v.device)
            longest, shared = max(lengths), q.shape[1] != k.shape[1]
            q, k = q.to(v.dtype), k.to(v.dtype)  # RoPE computes in float32
            y = varlen_attn(q, k, v, begins, begins, longest, longest, window_size=(-1, 0), enable_gqa=shared)
            return cast(Tensor, y)
        parts = (projected.split(lengths) for projected in (q, k, v))  # (t, H or K, D)
        own = [self._attend(*(part[None] for part in one)) for one in zip(*parts, strict=True)]
        return torch.cat(own, dim=1)[0]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, append: Append | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attention of queries (B, T, H, D) to keys and values (B, T, K, D) and cached ones: (B, T, H, D)."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if append is not None:
            k, v = append(k, v)  # (B, K, S, D)
        T, S = q.shape[2], k.shape[2]
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_continuation_mask(T, S, q.device) if mask is None else mask,
            is_causal=T > 1 and S == T and mask is None,
            dropout_p=self._dropped,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # (B, H, T, D)
        return y.transpose(1, 2)


def _continuation_mask(T: int, S: int, device: torch.device) -> Tensor | None:
    """The causal mask of T new tokens after S - T cached ones; None if SDPA needs none."""
    if T in (1, S):
        return None
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class MLP(nn.Module):
    """SwiGLU, down(silu(gate(x)) × up(x)), times `residual_scale` and added to x."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.gate_proj = linear_layer(config.hidden_size, config.intermediate_size)
        self.up_proj = linear_layer(config.hidden_size, config.intermediate_size)
        self.down_proj = linear_layer(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if all(map(is_plain, layers)):
            weights = (layer.weight for layer in layers)
            return swiglu(x, norm.weight, norm.eps, self.residual_scale, *weights)
        gate, up = normed_linears(x, norm, self.gate_proj, self.up_proj)  # (B, T, F)
        return add_linear(x, self.down_proj, F.silu(gate).mul_(up), self.residual_scale)


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotary: Tensor | None, append: Append | None, attended: Attended | None = None
    ) -> Tensor:
        x = self.self_attn(x, self.input_layernorm, rotary, append, attended)
        return cast(Tensor, self.mlp(x, self.post_attention_layernorm))
