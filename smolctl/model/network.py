"""The network: a Llama-like decoder, written to be read from top to bottom.

Shapes: B sequences, T new tokens, S tokens attended to, C hidden_size, F intermediate_size,
H query heads, K key/value heads, D head_dim, V vocab_size.

Module names are Hugging Face's, so `Transformer.state_dict()` has the names of `LlamaForCausalLM`. A tied
head has no tensor of its own: the token table is used twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smolctl.arithmetic import GPU_LOSS_CHUNK_ROWS, LOSS_CHUNK_ROWS
from smolctl.config import ModelConfig
from smolctl.model import attention
from smolctl.model.cache import KVCache
from smolctl.model.documents import (
    Attended,
    causal_blocks,
    document_blocks,
    document_lengths,
    document_mask,
    has_kernels,
    positions_in_documents,
)
from smolctl.model.functional import linear, linear_cross_entropy, rotate, swiglu, tied_embedding
from smolctl.model.layers import (
    RMSNorm,
    add_linear,
    apply_linear,
    is_plain,
    linear_layer,
    normed_linears,
    uninitialized,
)
from smolctl.model.positions import rotary_angles

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_MIN_HEAD_DIM = 16  # of FlexAttention's Triton kernels
# `KVCache.append` of one layer.
Append = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def rotary_table(config: ModelConfig, positions: int, device: torch.device) -> Tensor:
    """cos and sin of the angles of the first positions, in float32: (2, positions, 1, D/2)."""
    angles = torch.from_numpy(rotary_angles(config, positions)).to(device)
    return torch.stack((angles.cos(), angles.sin()))


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
        has_dropout = self.training and self.dropout
        return attention.is_faster(x) and all(map(is_plain, layers)) and not has_dropout

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
        if has_kernels(v) and not (self.training and self.dropout):
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
            dropout_p=self.dropout if self.training else 0.0,
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


class Decoder(nn.Module):
    """Tokens to hidden states. Its module name, `model`, is Hugging Face's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = uninitialized(nn.Embedding, config.vocab_size, config.hidden_size)
        self.embed_positions: nn.Embedding | None = None
        if config.position_embedding == "learned":
            self.embed_positions = uninitialized(
                nn.Embedding, config.max_position_embeddings, config.hidden_size
            )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config
        self.is_compiled = False  # whether the blocks are
        self.masks_documents = False  # whether documents are separated by a mask instead of by their lengths
        self.checkpoint_activations = False  # save only a block's input, and recompute the block
        self._rotary: Tensor | None = None

    def _angles(self, positions: int, device: torch.device) -> Tensor:
        """The rotary table for at least this many positions; it grows with the longest sequence so far.

        A declared context may be a million tokens, so a table of that length is created only when needed.
        """
        table = self._rotary
        if table is None or table.shape[1] < positions or table.device != device:
            longer = min(2 * positions, self.config.max_position_embeddings)
            with torch.inference_mode(False):  # training may use a table created by a prediction
                table = rotary_table(self.config, max(positions, longer), device)
            self._rotary = table
        return table

    def forward(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) of tokens (B, T); `embedded`: their rows of the table, if known."""
        start = cache.length if cache is not None else 0
        positions = slice(start, start + input_ids.shape[1])
        x = self.embed_tokens(input_ids) if embedded is None else embedded  # (B, T, C)
        rotary = None
        if self.embed_positions is not None:
            if documents is None:
                x = x + self.embed_positions.weight[positions]
            else:
                x = x + self.embed_positions(positions_in_documents(documents))
        else:
            # RoPE depends only on relative positions, so a document need not start at angle 0.
            rotary = self._angles(positions.stop, x.device)[:, positions]
        attended = self._attended(x, documents) if cache is None else None
        for index, block in enumerate(self.layers):
            append = partial(cache.append, index) if cache is not None else None
            turned = rotary if self.config.rotates(index) else None
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, turned, append, attended, use_reentrant=False)
            else:
                x = block(x, turned, append, attended)
        if cache is not None:
            cache.length = positions.stop
        return self.norm(x)

    def _attended(self, x: Tensor, documents: Tensor | None) -> Attended | None:
        """What the blocks need to know of `documents` for hidden states x (B, T, C); None: nothing."""
        if self.attends_in_blocks(x):
            return causal_blocks(x.shape[1], x.device) if documents is None else document_blocks(documents)
        if documents is None:
            return None
        if self.is_compiled or self.masks_documents or not (x.device.type == "cpu" or has_kernels(x)):
            return document_mask(documents)
        return document_lengths(documents)

    def attends_in_blocks(self, x: Tensor) -> bool:
        """Whether FlexAttention computes the attention of hidden states x (…, C)."""
        has_dropout = self.training and self.config.attention_dropout
        is_wide_enough = self.config.head_dim >= FLEX_MIN_HEAD_DIM
        return self.is_compiled and has_kernels(x) and is_wide_enough and not has_dropout


class Transformer(nn.Module):
    """The language model: a decoder and a head that may share its token table.

    A new one has no values yet: `weights.initialize` initializes them, `weights.load_network` reads them.

    Args:
        config: the shape. At most `max_position_embeddings` tokens can be processed at once.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = linear_layer(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V, C) from hidden states to logits."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def compile_blocks(self) -> None:
        """Compile the blocks with torch.compile, in place: the names of their tensors do not change.

        All have the same shape, so one compilation serves all of them, or one the blocks with RoPE and one
        those without.
        """
        self.model.is_compiled = True
        for block in self.model.layers:
            block.compile()

    @contextmanager
    def not_compiled(self) -> Iterator[None]:
        """Compute without the compiled blocks, which would be compiled again for every length of a prompt."""
        was_compiled, self.model.is_compiled = self.model.is_compiled, False
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.model.is_compiled = was_compiled

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, C) as logits (…, V)."""
        if self.lm_head is None:
            return linear(hidden, self.model.embed_tokens.weight)
        return apply_linear(self.lm_head, hidden)

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of the token after each of `input_ids` (B, T).

        With `documents` (B, T), without a cache, a token attends only to tokens of the same document.
        Learned positions start at 0 in each document.
        """
        return self.logits(self.model(input_ids, cache, documents))

    def next_token_logits(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, V) after the last token only: a prompt needs no others."""
        return self.logits(self.model(input_ids, cache)[:, -1])

    def loss(self, input_ids: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Sum of the cross entropy over all tokens in nats; arguments as in `training_loss`."""
        return self.training_loss(input_ids, targets, 0.0, documents)[0]

    def training_loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        z_loss: float,
        documents: Tensor | None = None,
        trained: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of cross entropy and z-loss over the targets that count, in nats, and its z-loss part.

        `input_ids` and `targets` are (B, T), `z_loss` is the weight of logsumexp², `documents` is as in
        `forward`, and `trained` (B, T) says which targets count; None: all. No logits are computed for other
        targets.

        The logits exist only in chunks, forward and backward: all of them at once would be 49,152 numbers per
        token, more than everything else that a layer saves.
        """
        embedded, head = None, self.head_weight
        if self.lm_head is None and input_ids.device.type == "cpu":
            embedded, head = tied_embedding(input_ids, head)
        hidden = self.model(input_ids, documents=documents, embedded=embedded).flatten(0, 1)  # (B·T, C)
        targets = targets.flatten()
        if trained is not None:
            chosen = trained.flatten().nonzero()[:, 0]
            hidden, targets = hidden.index_select(0, chosen), targets[chosen]  # (N, C), (N,)
        rows = GPU_LOSS_CHUNK_ROWS if hidden.is_cuda else LOSS_CHUNK_ROWS
        compiled = self.model.is_compiled
        return linear_cross_entropy(hidden, head, targets, rows, z_loss, compiled)

    def token_losses(self, input_ids: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Cross entropy in nats of every token, (B, T); for evaluation, without gradients."""
        hidden = self.model(input_ids, documents=documents).flatten(0, 1)  # (B·T, C)
        losses = [
            F.cross_entropy(self.logits(part).float(), target, reduction="none")
            for part, target in zip(
                hidden.split(LOSS_CHUNK_ROWS), targets.flatten().split(LOSS_CHUNK_ROWS), strict=True
            )
        ]
        return torch.cat(losses).view_as(targets)
