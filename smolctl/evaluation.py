"""How well a model predicts text it has not seen, in a unit that outlives its tokenizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smolctl.data.batches import Sequences, sequences_of
from smolctl.errors import InputError
from smolctl.model.network import Transformer
from smolctl.sources.base import RecordedLoss


@dataclass(frozen=True)
class BitsPerByte:
    """Mean information of a byte of text under the model."""

    bits_per_byte: float
    standard_error: float | None  # of the mean, over windows; None: one window has none
    loss: float  # nats a token


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error over windows."""

    mean: float
    standard_error: float | None  # None: one window has none


@dataclass(frozen=True)
class WindowScores:
    """One window of T tokens under a model, and beside a reference where there is one."""

    nats: float  # sum over the tokens
    kl: float  # sum of KL(reference ‖ model) in nats
    agreements: int  # positions at which both rank the same token first; none where a prediction is NaN
    tokens: int
    bytes: int


def score_window(
    logits: Tensor, targets: Tensor, size: int, reference: Tensor | None = None, rows: int = 64
) -> WindowScores:
    """Score the predictions of one window.

    Args:
        logits: (T, V) of the model.
        targets: (T,) the tokens that came.
        size: bytes of text behind the targets.
        reference: (T, V) logits of the model that it is compared with.
        rows: tokens that are worked on at once: a table of 49,152 columns needs no second copy.
    """
    nats = kl = 0.0
    agreements = 0
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        own = logits[part].float().log_softmax(-1)
        nats -= own.gather(-1, targets[part, None]).double().sum().item()
        if reference is not None:
            theirs = reference[part].float().log_softmax(-1)
            same = own.argmax(-1) == theirs.argmax(-1)
            agreements += int((same & own.amax(-1).isfinite()).sum())
            kl += theirs.exp().mul_(theirs - own).double().sum().item()
    kl = 0.0 if kl < 0 else kl  # rounding; not max(), which may drop a NaN
    return WindowScores(nats, kl, agreements, len(targets), size)


def ratio_estimate(amounts: Sequence[float] | Tensor, sizes: Sequence[float] | Tensor) -> Estimate:
    """Sum of amounts over sum of sizes, one of each for every window.

    The standard error is that of a ratio estimate, from the spread of (amount - ratio × size) over the
    windows, which are treated as independent; one window has no spread, and None is its error.
    """
    amount, size = (torch.as_tensor(values, dtype=torch.float64) for values in (amounts, sizes))
    ratio = (amount.sum() / size.sum()).item()
    if len(amounts) < 2:
        return Estimate(ratio, None)
    spread = (amount - ratio * size).square().sum().item() / (len(amounts) - 1)
    return Estimate(ratio, math.sqrt(spread / len(amounts)) / size.mean().item())


def _losses(
    network: Transformer, batches: Iterable[Tensor], document_end: int | None
) -> Iterator[tuple[Sequences, Tensor]]:
    """Batches (B, T + 1) as sequences, and the nats (B, T) of their targets, in evaluation mode."""
    was_training = network.training
    network.eval()
    for batch in batches:
        asked = sequences_of(batch.to(network.head_weight.device), document_end)
        losses = network.token_losses(asked.inputs, asked.targets, asked.documents)
        yield asked, asked.counted(losses.double())
    network.train(was_training)


@torch.inference_mode()
def bits_per_byte(
    network: Transformer, batches: Iterable[Tensor], token_bytes: Tensor, document_end: int | None = None
) -> BitsPerByte:
    """Evaluate windows of tokens; the standard error is `ratio_estimate`'s.

    Args:
        network: any mode; dropout is switched off meanwhile.
        batches: tokens (B, T + 1); of conversations only what the assistant says counts.
        token_bytes: bytes of text behind every token id, (V,).
        document_end: the token that attention does not cross; None: it crosses all.
    """
    nats, sizes, tokens = [], [], 0
    for asked, losses in _losses(network, batches, document_end):
        nats.append(losses.sum(dim=1))
        lengths = token_bytes.to(losses.device)[asked.targets].double()
        sizes.append(asked.counted(lengths).sum(dim=1))
        tokens += int(asked.trained_tokens)
    total = torch.cat(nats)
    estimate = ratio_estimate(total / math.log(2), torch.cat(sizes))
    return BitsPerByte(estimate.mean, estimate.standard_error, total.sum().item() / tokens)


@torch.inference_mode()
def mean_loss(network: Transformer, tokens: Tensor, document_end: int | None = None) -> float:
    """Cross entropy in nats a token of sequences (N, T + 1), one at a time, computed in float32.

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


LARGEST_LOSS_CHANGE = 1e-3  # nats a token, between a run's own record and an export of the same weights


def require_recorded_loss(network: Transformer, recorded: RecordedLoss, origin: str) -> None:
    """Check that weights give the loss that their run recorded when it wrote the checkpoint.

    Raises:
        InputError: they do not: the weights are not the ones that were trained.
    """
    loss = mean_loss(network, recorded.tokens, recorded.document_end)
    if not abs(loss - recorded.loss) <= LARGEST_LOSS_CHANGE:
        raise InputError(
            f"{origin}: the weights give a loss of {loss:.4f} on the run's held-out sequences, "
            f"the run recorded {recorded.loss:.4f}",
            "The weights are not the ones that were trained: use another checkpoint.",
        )
