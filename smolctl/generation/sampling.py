"""From logits to a token: pure functions of (logits, settings, generator)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smolctl.errors import UsageError


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen. The defaults keep the model's own distribution.

    Raises:
        UsageError: a value outside its range, named.
    """

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens with this probability together
    min_p: float = 0.0  # keep tokens at least this share as likely as the most likely one
    repetition_penalty: float = 1.0  # divide the logits of tokens already there (Keskar et al., 2019)

    def __post_init__(self) -> None:
        ranges = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        limits = {
            "temperature": "0 or more",
            "top_k": "0 or more",
            "top_p": "above 0 and at most 1",
            "min_p": "between 0 and 1",
            "repetition_penalty": "above 0",
        }
        for name, fits in ranges.items():
            if not fits:
                option = name.replace("_", "-")
                raise UsageError(
                    f"--{option} {getattr(self, name)} is out of range", f"It must be {limits[name]}."
                )


def choose(logits: Tensor, settings: SamplingSettings, generator: torch.Generator, seen: Tensor) -> Tensor:
    """The next token of every sequence, (B,).

    Args:
        logits: (B, V), any float dtype.
        settings: how to choose.
        generator: the only source of chance; untouched when temperature is 0.
        seen: token ids already in each sequence, (B, S), for the repetition penalty.
    """
    logits = penalize_repetition(logits.float(), seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = distribution(logits, settings)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely: positive logits divided, negative ones multiplied."""
    if penalty == 1.0:
        return logits
    at_seen = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(at_seen > 0, at_seen / penalty, at_seen * penalty))


def distribution(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Probabilities (B, V) after temperature, top-k, top-p and min-p, in this order."""
    probabilities = (logits / settings.temperature).softmax(dim=-1)
    if settings.top_k:
        kth = probabilities.topk(min(settings.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= kth, 0.0)
    if settings.top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays when those before it have not yet reached top_p: the first always does.
        before = ordered.cumsum(dim=-1) - ordered
        kept = ordered.where(before < settings.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, kept)
    if settings.min_p:
        floor = settings.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.where(probabilities >= floor, 0.0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)
