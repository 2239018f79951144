"""How well a model predicts text that it was not trained on, in a unit that does not depend on its
tokenizer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smolctl.data.batches import Sequences, sequences_of
from smolctl.errors import InputError
from smolctl.evaluation.estimate import Floats, by_document, observations, resampled_estimate
from smolctl.model.network import Transformer
from smolctl.sources.base import RecordedLoss


@dataclass(frozen=True)
class BitsPerByte:
    """Mean information of a byte of text under the model."""

    bits_per_byte: float
    standard_error: float | None  # of the mean, over documents; None: a single document has none
    loss: float  # nats per token
    margin: float | None  # bits_per_byte ± margin is the interval at `timing.CONFIDENCE`


@dataclass(frozen=True)
class TokenScores:
    """Scores of T predictions under a model, and against a reference if there is one; (T,) each."""

    nats: Tensor  # float64
    kl: Tensor  # KL(reference ‖ model) in nats, float64; zeros without a reference
    agrees: Tensor  # whether both rank the same token first; false if a prediction is NaN


def score_tokens(
    logits: Tensor, targets: Tensor, reference: Tensor | None = None, rows: int = 64
) -> TokenScores:
    """Score the predictions of some tokens.

    Args:
        logits: (T, V) of the model.
        targets: (T,) the actual tokens.
        reference: (T, V) logits of the model to compare with.
        rows: tokens per step, so that a table of 49,152 columns needs no second copy.
    """
    nats = torch.empty(len(targets), dtype=torch.float64)
    kl, agrees = torch.zeros_like(nats), torch.zeros(len(targets), dtype=torch.bool)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        own = logits[part].float().log_softmax(-1)
        nats[part] = -own.gather(-1, targets[part, None])[:, 0].double()
        if reference is not None:
            theirs = reference[part].float().log_softmax(-1)
            agrees[part] = (own.argmax(-1) == theirs.argmax(-1)) & own.amax(-1).isfinite()
            kl[part] = theirs.exp().mul_(theirs - own).double().sum(-1)
    return TokenScores(nats, kl, agrees)


def bits(nats: Tensor | Floats) -> Floats:
    """Nats as bits."""
    return np.asarray(nats, np.float64) / math.log(2)


def _losses(
    network: Transformer, batches: Iterable[Tensor], document_end: int | None
) -> Iterator[tuple[Sequences, Tensor]]:
    """Yields batches (B, T + 1) as sequences, with the nats (B, T) of their targets, in evaluation mode."""
    was_training = network.training
    network.eval()
    try:
        for batch in batches:
            asked = sequences_of(batch.to(network.head_weight.device), document_end)
            losses = network.token_losses(asked.inputs, asked.targets, asked.documents)
            yield asked, asked.counted(losses.double())
    finally:
        network.train(was_training)


@torch.inference_mode()
def bits_per_byte(
    network: Transformer,
    batches: Iterable[Tensor],
    token_bytes: Tensor,
    document_end: int | None = None,
    documents: Iterable[Tensor] | None = None,
) -> BitsPerByte:
    """Evaluate sequences of tokens.

    Args:
        network: in any mode; dropout is off during the evaluation.
        batches: tokens (B, T + 1); of conversations, only what the assistant says counts.
        token_bytes: bytes of text of every token id, (V,).
        document_end: the token that ends a document for attention; None: attention crosses documents.
        documents: the number of every target's document, (B, T) for each batch; None: every sequence is one.
    """
    found: list[tuple[Tensor, ...]] = []  # for each batch: sequences, documents, nats and bytes
    numbers = None if documents is None else iter(documents)
    sequences = counted = 0
    for asked, losses in _losses(network, batches, document_end):
        targets = asked.targets
        sequence = torch.arange(sequences, sequences + len(targets))[:, None].expand(targets.shape)
        owner = sequence if numbers is None else next(numbers)
        sizes = token_bytes.to(targets.device)[targets]
        counts = torch.ones_like(targets, dtype=torch.bool) if asked.trained is None else asked.trained
        found.append(tuple(part.cpu()[counts.cpu()] for part in (sequence, owner, losses, sizes)))
        sequences, counted = sequences + len(targets), counted + int(asked.trained_tokens)
    stretches, owners, nats, bytes_ = (torch.cat(column) for column in zip(*found, strict=True))
    own_bits, own_bytes = by_document(observations(owners, stretches), bits(nats), bytes_)
    estimate = resampled_estimate(own_bits, own_bytes)
    loss = nats.sum().item() / counted
    return BitsPerByte(estimate.mean, estimate.standard_error, loss, estimate.margin)


@torch.inference_mode()
def mean_loss(network: Transformer, tokens: Tensor, document_end: int | None = None) -> float:
    """Cross entropy in nats per token of sequences (N, T + 1), one at a time, computed in float32.

    Arguments as in `bits_per_byte`.
    """
    wide = network if network.head_weight.dtype == torch.float32 else copy.deepcopy(network).float()
    with torch.autocast(network.head_weight.device.type, enabled=False):
        scored = [
            (losses.sum(), asked.trained_tokens)
            for asked, losses in _losses(wide, tokens.long().split(1), document_end)
        ]
    means = [nats / count for nats, count in scored if count]
    return torch.stack(means).mean().item()


LARGEST_LOSS_CHANGE = 1e-3  # nats per token, between a run's record and an export of the same weights


def require_recorded_loss(network: Transformer, recorded: RecordedLoss, origin: str) -> None:
    """Check that the weights give the loss that their run recorded when it wrote the checkpoint.

    Raises:
        InputError: they do not, so the weights are not those that were trained.
    """
    loss = mean_loss(network, recorded.tokens, recorded.document_end)
    if not abs(loss - recorded.loss) <= LARGEST_LOSS_CHANGE:
        raise InputError(
            f"{origin}: the weights give a loss of {loss:.4f} on the run's held-out sequences, "
            f"the run recorded {recorded.loss:.4f}",
            "The weights are not the ones that were trained: use another checkpoint.",
        )
