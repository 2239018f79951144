"""The network: a Llama-like decoder, written to be read from top to bottom.

Shapes: B sequences, T new tokens, S tokens attended to, C hidden_size, F intermediate_size,
H query heads, K key/value heads, D head_dim, V vocab_size.

Module names are Hugging Face's, so `Transformer.state_dict()` has the names of `LlamaForCausalLM`. A tied
head has no tensor of its own: the token table is used twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smolctl.arithmetic import GPU_LOSS_CHUNK_ROWS, LOSS_CHUNK_ROWS
from smolctl.config import ModelConfig
from smolctl.model.block import Block
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
from smolctl.model.functional import linear, linear_cross_entropy, tied_embedding
from smolctl.model.layers import RMSNorm, apply_linear, linear_layer, uninitialized
from smolctl.model.positions import rotary_angles

FLEX_MIN_HEAD_DIM = 16  # of FlexAttention's Triton kernels


def rotary_table(config: ModelConfig, positions: int, device: torch.device) -> Tensor:
    """cos and sin of the angles of the first positions, in float32: (2, positions, 1, D/2)."""
    angles = torch.from_numpy(rotary_angles(config, positions)).to(device)
    return torch.stack((angles.cos(), angles.sin()))


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
