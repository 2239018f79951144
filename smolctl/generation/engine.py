"""Prefill once, then one token at a time. Knows token ids only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from smolctl.errors import InputError
from smolctl.generation.sampling import SamplingSettings, choose
from smolctl.model.cache import KVCache
from smolctl.model.network import Transformer

# Tokens of a long prompt that go through the network at once: enough to fill the matrix products,
# few enough that the MLP's intermediate values stay small.
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class NextTokens:
    """One step of B sequences decoded together."""

    tokens: Tensor  # (B,) the tokens chosen
    logprobs: Tensor  # (B,) their log-probabilities in nats under the unmodified model
    logits: Tensor  # (B, V) what they were chosen from


@torch.inference_mode()
def prefill(network: Transformer, prompt: Tensor, cache: KVCache) -> Tensor:
    """Fill the cache with a prompt (B, T) and return the logits (B, V) after its last token."""
    *body, last = prompt.split(PREFILL_CHUNK, dim=1)
    for part in body:
        network.model(part, cache)
    return network.next_token_logits(last, cache)


@torch.inference_mode()
def decode(
    network: Transformer, prompt: Tensor, max_tokens: int, settings: SamplingSettings, seed: int
) -> Iterator[NextTokens]:
    """Continue a batch of prompts of one length, a token each at a time, `max_tokens` times.

    The caller stops taking when its sequences have ended. The generator is this call's own: the
    same seed gives the same tokens, and the global generators are left alone.

    Args:
        network: in evaluation mode.
        prompt: token ids (B, T), T at least 1.
        max_tokens: at most this many tokens; cut where the model's context ends.
        settings: how a token is chosen.
        seed: of this call's generator.

    Raises:
        InputError: the prompt is empty or leaves no room in the model's context.
    """
    batch, length = prompt.shape
    context = network.config.max_position_embeddings
    if length == 0:
        raise InputError("the prompt is empty", "Give --prompt some text.")
    if length >= context:
        raise InputError(
            f"the prompt has {length} tokens, the model's context holds {context}", "Shorten the prompt."
        )
    capacity = min(length + max_tokens, context)
    weight = network.head_weight
    cache = KVCache.allocate(network.config, batch, capacity, weight.dtype, weight.device)
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    seen = torch.empty((batch, capacity), dtype=torch.long, device=weight.device)
    seen[:, :length] = prompt
    logits = prefill(network, prompt, cache)
    for end in range(length, capacity):
        tokens = choose(logits, settings, generator, seen[:, :end])
        logprobs = logits.float().log_softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
        seen[:, end] = tokens
        yield NextTokens(tokens, logprobs, logits)
        if end + 1 < capacity:
            logits = network.next_token_logits(tokens[:, None], cache)
