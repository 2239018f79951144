"""The loop around an engine: prefill, then one token for every sequence at a time. Knows ids only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smolctl.errors import InputError
from smolctl.generation.engine import Cache, Engine
from smolctl.generation.sampling import SamplingSettings, choose


@dataclass(frozen=True)
class NextTokens:
    """One step of B sequences decoded together."""

    tokens: Tensor  # (B,) the tokens chosen
    logprobs: Tensor  # (B,) their log-probabilities in nats under the unmodified model
    logits: Tensor  # (B, V) what they were chosen from


def check_prompt(length: int, context: int) -> None:
    """Refuse a prompt that is empty or leaves no room in the context."""
    if length == 0:
        raise InputError("the prompt is empty", "Give --prompt some text.")
    if length >= context:
        raise InputError(
            f"the prompt has {length} tokens, the model's context holds {context}", "Shorten the prompt."
        )


def decode(
    engine: Engine,
    prompt: Sequence[int],
    samples: int,
    max_tokens: int,
    settings: SamplingSettings,
    seed: int,
) -> Iterator[NextTokens]:
    """Continue a prompt `samples` times, a token each at a time, `max_tokens` times.

    The prompt is read once. The caller stops taking when its sequences have ended. The generator is this
    call's own: the same seed gives the same tokens, and the global generators are left alone.

    Args:
        engine: the model.
        prompt: token ids, at least one.
        samples: B, sequences that continue it.
        max_tokens: at most this many tokens; cut where the model's context ends.
        settings: how a token is chosen.
        seed: of this call's generator.

    Raises:
        InputError: the prompt is empty or leaves no room in the model's context.
    """
    context = engine.config.max_position_embeddings
    check_prompt(len(prompt), context)
    capacity = min(len(prompt) + max_tokens, context)
    cache = engine.allocate(samples, capacity)
    generator = torch.Generator().manual_seed(seed)
    seen = torch.empty((samples, capacity), dtype=torch.long)
    seen[:, : len(prompt)] = torch.tensor(prompt)
    logits = prefill(engine, prompt, cache)
    for end in range(len(prompt), capacity):
        tokens = choose(logits, settings, generator, seen[:, :end])
        logprobs = logits.log_softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
        seen[:, end] = tokens
        yield NextTokens(tokens, logprobs, logits)
        if end + 1 < capacity:
            logits = engine.forward([[token] for token in tokens.tolist()], cache)


def prefill(engine: Engine, prompt: Sequence[int], cache: Cache) -> Tensor:
    """Read a prompt once for all sequences of an empty cache; logits (B, V) after its last token."""
    others = len(cache.lengths) - 1
    logits = engine.forward([prompt, *([[]] * others)], cache)
    for sequence in range(1, others + 1):
        cache.copy(0, sequence)
    return logits.expand(len(cache.lengths), -1)
