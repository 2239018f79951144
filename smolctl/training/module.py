"""One optimizer step: what Lightning calls, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from smolctl.config import RunConfig
from smolctl.data.batches import StepDataset, document_ids
from smolctl.errors import SmolError
from smolctl.model.network import Transformer
from smolctl.training.distributed import gather
from smolctl.training.lightning import LightningOptimizer, ParallelStrategy, pl
from smolctl.training.optim.optimizers import apply_settings, make_optimizer
from smolctl.training.optim.schedule import learning_rate
from smolctl.training.rng import capture_rng, restore_rng


class NonFiniteError(SmolError):
    """The loss or the gradient is not a number; the weights were left as they were."""


@dataclass(frozen=True)
class StepResult:
    """Numbers of the step just done."""

    loss: float  # nats a token over all devices
    gradient_norm: float
    learning_rate: float


class TrainingModule(pl.LightningModule):
    """A batch is a whole step: it is cut into micro-batches here, so that one batch is one update.

    The loss of every micro-batch is divided by the tokens of the whole step: any cut of the step
    gives the same gradient.

    Args:
        network: with its weights.
        config: of the run.
        dataset: of this device; says which windows a step read.
        fingerprints: of data and tokenizer, kept in every checkpoint.
    """

    def __init__(
        self,
        network: Transformer,
        config: RunConfig,
        dataset: StepDataset,
        fingerprints: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.config = config
        self.dataset = dataset
        self.fingerprints = dict(fingerprints)
        self.result: StepResult | None = None
        self._rng: list[dict[str, Any]] = []  # of every process, to restore before the first resumed step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.network, self.config.optimizer)

    def on_train_start(self) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        # A resumed optimizer comes with the settings it was saved with; the config may have changed them.
        apply_settings(optimizer.optimizer, self.config.optimizer)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Run one step on tokens (sequences of this device, sequence_length + 1)."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        rate = learning_rate(self.global_step + 1, self.config.optimizer.learning_rate, self.config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = self._accumulate(batch)
        loss, norm = self._mean_over_devices(losses.sum()), self._clip()
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            optimizer.zero_grad(set_to_none=True)
            raise self._non_finite(losses, loss, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.result = StepResult(loss.item(), norm.item(), rate)

    @property
    def _sequences(self) -> int:
        """Sequences of this device in memory at once."""
        return max(1, self.config.micro_batch_size // self.trainer.world_size)

    def _accumulate(self, batch: Tensor) -> Tensor:
        """Gradients of the mean loss over all tokens of the step.

        Returns:
            Each micro-batch's part of that loss, (micro-batches,), detached.
        """
        strategy = self.trainer.strategy
        tokens = batch.shape[0] * (batch.shape[1] - 1)
        losses = []
        parts = batch.split(self._sequences)
        for index, part in enumerate(parts):
            last = index + 1 == len(parts)
            # Several devices exchange gradients once a step, with the last micro-batch.
            waits = not last and isinstance(strategy, ParallelStrategy)
            with cast(ParallelStrategy, strategy).block_backward_sync() if waits else nullcontext():
                documents = document_ids(part[:, :-1], self.dataset.document_end)
                loss = self.network.loss(part[:, :-1], part[:, 1:], self.config.train.z_loss, documents)
                loss = loss / tokens
                self.manual_backward(loss)
            losses.append(loss.detach().float())
        return torch.stack(losses)

    def _mean_over_devices(self, loss: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(loss, reduce_op="mean")
        return reduced if isinstance(reduced, Tensor) else loss

    def _clip(self) -> Tensor:
        """Scale the gradients to the largest allowed norm; returns the norm before, ()."""
        largest = self.config.train.gradient_clip or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.network.parameters(), largest)

    def _non_finite(self, losses: Tensor, loss: Tensor, norm: Tensor) -> NonFiniteError:
        """The error that names the step and the windows it read, those of the first bad micro-batch."""
        windows = self.dataset.windows(self.global_step)
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        if bad:
            size = self._sequences
            windows = windows[bad[0] * size : (bad[0] + 1) * size]
        length = self.config.data.sequence_length
        named = [self.dataset.tokens.describe(window) for window in windows[:8]]
        where = ", ".join(named) + (", …" if len(windows) > 8 else "")
        return NonFiniteError(
            f"step {self.global_step + 1}: loss {loss.item()}, gradient norm {norm.item()}; the step was not "
            f"taken. It read windows {where} of {length:,} tokens",
            "Lower optimizer.learning_rate or look at these windows; the checkpoints are untouched.",
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What Lightning leaves out: the config, the random states, what the data was. Plain values."""
        checkpoint["hyper_parameters"] = {"config": self.config.model_dump(mode="json")}
        checkpoint["smolctl"] = {
            **self.fingerprints,
            "samples": self.dataset.samples_before(self.global_step),
            "rng": gather(capture_rng(), self.trainer),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint["smolctl"]["rng"]

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Put the random states back at the last moment: what comes before may have drawn from them."""
        if not self._rng and self.trainer.global_rank and not self.global_step:
            torch.manual_seed(self.config.train.seed + self.trainer.global_rank)  # other dropout on each
        if self.trainer.global_rank < len(self._rng):
            restore_rng(self._rng[self.trainer.global_rank])
        self._rng = []
