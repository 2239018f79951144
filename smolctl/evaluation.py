"""How well a model predicts text it has not seen, in a unit that outlives its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from smolctl.data.batches import document_ids
from smolctl.model.network import Transformer


@dataclass(frozen=True)
class BitsPerByte:
    """Mean information of a byte of text under the model."""

    bits_per_byte: float
    standard_error: float  # of the mean, over windows
    loss: float  # nats a token
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.inference_mode()
def bits_per_byte(
    network: Transformer, batches: Iterable[Tensor], token_bytes: Tensor, document_end: int | None = None
) -> BitsPerByte:
    """Evaluate windows of tokens.

    Bits per byte is a ratio of two sums over windows; its standard error is that of a ratio estimate:
    the spread of (bits - ratio × bytes) over the windows. Windows are treated as independent.

    Args:
        network: any mode; dropout is switched off meanwhile.
        batches: tokens (B, T + 1).
        token_bytes: bytes of text behind every token id, (V,).
        document_end: the token that attention does not cross; None: it crosses all.
    """
    was_training = network.training
    network.eval()
    nats, sizes, tokens = [], [], 0
    for batch in batches:
        batch = batch.to(network.head_weight.device)
        documents = document_ids(batch[:, :-1], document_end)
        losses = network.token_losses(batch[:, :-1], batch[:, 1:], documents)  # (B, T)
        nats.append(losses.double().sum(dim=1))
        sizes.append(token_bytes.to(batch.device)[batch[:, 1:]].double().sum(dim=1))
        tokens += losses.numel()
    network.train(was_training)
    bits, size = torch.cat(nats) / math.log(2), torch.cat(sizes)
    ratio = (bits.sum() / size.sum()).item()
    windows = len(bits)
    spread = (bits - ratio * size).square().sum().item() / max(1, windows - 1)
    error = math.sqrt(spread / windows) / size.mean().item()
    loss = bits.sum().item() * math.log(2) / tokens
    return BitsPerByte(ratio, error, loss, tokens, int(size.sum().item()))
