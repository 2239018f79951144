"""The LightningModule, which computes one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from smolctl.config import RunConfig
from smolctl.data.batches import Sequences, sequences_of, text_sequences
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.evaluation import mean_loss
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize
from smolctl.runs.checkpoint_file import FORMAT
from smolctl.sources.base import TokenizerFiles
from smolctl.training.device import autocast, muon_dtype
from smolctl.training.distributed import gather
from smolctl.training.graph import GradientGraph
from smolctl.training.guards import NonFiniteError
from smolctl.training.lightning import LightningOptimizer, ParallelStrategy, pl
from smolctl.training.optim.optimizers import apply_settings, make_optimizer, set_step
from smolctl.training.optim.schedule import learning_rate
from smolctl.training.patience import Progress
from smolctl.training.rng import capture_rng, restore_rng

if TYPE_CHECKING:
    from smolctl.training.prepare import Prepared

MOST_SKIPPED = 10  # consecutive overflows of float16 gradients, which lowering the scale did not prevent


@dataclass(frozen=True)
class StepResult:
    """The numbers of the last step."""

    loss: float | None  # cross-entropy, nats per token over all devices; None if float16 overflowed
    gradient_norm: float | None
    learning_rate: float
    z_loss: float | None = None  # the term that train.z_loss adds; None if it is off or float16 overflowed


class TrainingModule(pl.LightningModule):
    """A batch is a whole step, which is split into micro-batches here, so that one batch gives one update.

    The loss of every micro-batch is divided by the tokens that count in the whole step, so every division of
    the step gives the same gradient, however many tokens a micro-batch or a device has.

    A checkpoint is sufficient to create one: `TrainingModule.load_from_checkpoint("final.ckpt")`. Calling it
    with tokens (B, T) gives logits (B, T, V), `generate` continues a text, and a stock `Trainer` continues
    training with batches of tokens (B, T + 1) at the learning rate of the checkpoint's step.

    Args:
        config: of the run, or its values from a checkpoint.
        prepared: weights, tokenizer and tokens of the run; None initializes new weights.
        rank, world_size: of this device.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any],
        prepared: Prepared | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config if isinstance(config, RunConfig) else RunConfig.model_validate(config)
        self.prepared = prepared
        self.tokenizer: Tokenizer | None = prepared.tokenizer if prepared else None
        self.dataset = prepared.dataset(rank, world_size) if prepared else None
        self.network: Transformer = (
            prepared.network if prepared else initialize(self.config.model, self.config.train.seed)
        )
        self.result: StepResult | None = None
        self.progress = Progress()  # of the validations
        self.skipped = 0  # steps so far with overflowing float16 gradients
        self._skipped_in_a_row = 0
        self._scaler: torch.amp.GradScaler | None = None
        self._kept: dict[str, Any] = {}  # the run's data in the checkpoint that this was loaded from
        self._first_step = 0  # step of the checkpoint; a new Trainer counts from 0
        self._graph: GradientGraph[tuple[Tensor, Tensor]] | None = None
        self._rng: list[dict[str, Any]] = []  # for each process, to be restored before the first resumed step

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("network" if name == "model" else name, value)

    @property
    def model(self) -> nn.Module:
        """The network, under the name that is common in LightningModules."""
        return self.network

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `input_ids` (B, T)."""
        logits: Tensor = self.network(input_ids)
        return logits

    def generate(self, prompt: str, max_tokens: int = 32) -> str:
        """The greedy continuation of a text.

        Raises:
            InputError: the prompt does not fit the context.
        """
        from smolctl.generation.complete import CompletionSettings, complete
        from smolctl.generation.torch_engine import TorchEngine

        assert self.tokenizer is not None, "a module that was loaded from a checkpoint has its tokenizer"
        engine, settings = TorchEngine(self.network.eval()), CompletionSettings(max_tokens=max_tokens)
        return complete(engine, self.tokenizer, self.tokenizer.prompt(prompt), settings).completions[0].text

    def configure_optimizers(self) -> torch.optim.Optimizer:
        dtype = muon_dtype(self.config, self.device)
        return make_optimizer(self.network, self.config.optimizer, dtype)

    def on_train_start(self) -> None:
        self.network.train()
        # A resumed optimizer has the settings of its checkpoint, but the config may have changed.
        apply_settings(self._optimizer.optimizer, self.config.optimizer)
        if self.config.train.precision == "16-mixed":
            self._scaler = torch.amp.GradScaler(self.device.type)
            if state := self._kept.get("scaler"):
                self._scaler.load_state_dict(state)

    @property
    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Run one step on tokens (sequences of this device, sequence_length + 1)."""
        optimizer, step = self._optimizer, self._first_step + self.global_step + 1
        rate = learning_rate(step, self.config.optimizer.learning_rate, self.config.schedule)
        set_step(optimizer.optimizer, self.config.optimizer, rate, self.config.schedule.planned(step))
        losses, z_losses = self._accumulate(batch)
        loss, norm = self._mean_over_devices(losses.sum()), self._clip(optimizer)
        if finite := bool(torch.isfinite(loss) and torch.isfinite(norm)):
            self._skipped_in_a_row = 0
        else:
            optimizer.zero_grad(set_to_none=True)
            self._count_skipped(losses, loss, norm)
        optimizer.step()  # without gradients it counts the step but does not change the weights
        optimizer.zero_grad(set_to_none=True)
        if self._scaler is not None:
            self._scaler.update()
        self.result = StepResult(None, None, rate)
        if finite and not self.config.train.z_loss:
            self.result = StepResult(loss.item(), norm.item(), rate)
        elif finite:
            z_loss = self._mean_over_devices(z_losses.sum())
            self.result = StepResult((loss - z_loss).item(), norm.item(), rate, z_loss.item())

    def _count_skipped(self, losses: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Skip a step with overflowing float16 gradients; the scaler then lowers its scale.

        Raises:
            NonFiniteError: there is no scaler, or `MOST_SKIPPED` consecutive steps overflowed.
        """
        self.skipped, self._skipped_in_a_row = self.skipped + 1, self._skipped_in_a_row + 1
        if self._scaler is None or self._skipped_in_a_row >= MOST_SKIPPED:
            raise self._non_finite(losses, loss, norm)

    @property
    def _sequences(self) -> int:
        """Sequences in memory at the same time on this device."""
        return max(1, self.config.micro_batch_size // self.trainer.world_size)

    @property
    def _document_end(self) -> int | None:
        return self.dataset.document_end if self.dataset else None

    def _accumulate(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Compute gradients of the mean loss over all tokens that count in the step, on all devices.

        Returns:
            Each micro-batch's part of that loss, and of the z-loss in it, both (micro-batches,), detached.
        """
        asked = sequences_of(batch, self._document_end)
        if self._suits_a_graph(asked):
            if self._graph is None:
                count = asked.targets.numel()

                def gradient(rows: Tensor) -> tuple[Tensor, Tensor]:
                    return self._accumulate_parts(text_sequences(rows, self._document_end), count)

                self._graph = GradientGraph(self.network, gradient, batch)
            return self._graph(batch)
        tokens = self._mean_over_devices(torch.as_tensor(asked.trained_tokens, device=batch.device).float())
        return self._accumulate_parts(asked, tokens)

    def _suits_a_graph(self, asked: Sequences) -> bool:
        """Whether a CUDA graph is possible: one GPU, no lengths that it would wait for, no random numbers, no
        communication, no loss scaler.
        """
        table = self.network.model.embed_tokens.weight
        with autocast(self.config, table.device):
            attends_in_blocks = self.network.model.attends_in_blocks(table)
        return (
            asked.inputs.is_cuda
            and asked.trained is None
            and (asked.documents is None or attends_in_blocks)
            and not self.config.model.attention_dropout
            and self._scaler is None
            and not isinstance(self.trainer.strategy, ParallelStrategy)
        )

    def _accumulate_parts(self, asked: Sequences, tokens: Tensor | int) -> tuple[Tensor, Tensor]:
        """`_accumulate` for a step with this many counted tokens over all devices, () or a number."""
        strategy = self.trainer.strategy
        losses, z_losses = [], []
        parts = list(asked.split(self._sequences))
        for index, part in enumerate(parts):
            last = index + 1 == len(parts)
            # Several devices exchange gradients once per step, with the last micro-batch.
            waits = not last and isinstance(strategy, ParallelStrategy)
            with cast(ParallelStrategy, strategy).block_backward_sync() if waits else nullcontext():
                with autocast(self.config, asked.inputs.device):
                    loss, z_loss = self.network.training_loss(
                        part.inputs, part.targets, self.config.train.z_loss, part.documents, part.trained
                    )
                loss = loss / tokens
                self.manual_backward(loss if self._scaler is None else self._scaler.scale(loss))
            losses.append(loss.detach().float())
            z_losses.append(z_loss / tokens)
        return torch.stack(losses), torch.stack(z_losses)

    def _mean_over_devices(self, loss: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(loss, reduce_op="mean")
        return reduced if isinstance(reduced, Tensor) else loss

    def _clip(self, optimizer: LightningOptimizer) -> Tensor:
        """Scale the gradients to the maximum norm; returns the norm before, ()."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer.optimizer)
        largest = self.config.train.gradient_clip or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.network.parameters(), largest)

    def _non_finite(self, losses: Tensor, loss: Tensor, norm: Tensor) -> NonFiniteError:
        """The error that names the step and the sequences of its first micro-batch that is not finite."""
        where = ""
        if self.dataset is not None:
            windows = self.dataset.windows(self.global_step)
            bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
            if bad:
                size = self._sequences
                windows = windows[bad[0] * size : (bad[0] + 1) * size]
            named = [self.dataset.tokens.describe(window) for window in windows[:8]]
            names = ", ".join(named) + (", …" if len(windows) > 8 else "")
            length = self.config.data.sequence_length
            where = f". It read sequences of {length:,} tokens that begin at tokens {names}"
        times = f" for the {MOST_SKIPPED}th time in a row" if self._scaler is not None else ""
        return NonFiniteError(
            f"step {self.global_step + 1}: loss {loss.item()}, gradient norm {norm.item()}{times}; the step "
            f"was not taken{where}",
            "Lower optimizer.learning_rate or look at these sequences; the checkpoints are untouched.",
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out, as plain values: config, tokenizer, random states, identity of
        the data.
        """
        checkpoint["hyper_parameters"] = {"config": self.config.model_dump(mode="json")}
        if self.tokenizer is not None:
            checkpoint["tokenizer"] = asdict(self.tokenizer.files())
        kept = {**self._kept, "format": FORMAT, "rng": gather(capture_rng(), self.trainer)}
        if self.prepared is not None and self.dataset is not None:
            kept |= self.prepared.fingerprints
            kept["tokens"] = [folder.name for folder in self.prepared.corpus.folders]
            kept["samples"] = self.dataset.samples_before(self.global_step)
            kept["decisions"] = asdict(self.prepared.decisions)
            kept["progress"] = asdict(self.progress)
            kept["held_out"] = {"tokens": self.prepared.held_out, "document_end": self._document_end}
        if (held_out := kept.get("held_out")) and self.trainer.is_global_zero:
            with self.network.not_compiled():
                loss = mean_loss(self.network, held_out["tokens"], held_out["document_end"])
            kept["held_out"] = {**held_out, "loss": loss}
        if self._scaler is not None:
            kept["scaler"] = self._scaler.state_dict()
            kept["skipped"] = [self.skipped, self._skipped_in_a_row]
        checkpoint["smolctl"] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._kept = dict(checkpoint.get("smolctl") or {})
        self._rng = self._kept.get("rng", [])
        self.skipped, self._skipped_in_a_row = self._kept.get("skipped", (0, 0))
        self.progress = Progress(**self._kept.get("progress", {}))
        if self.tokenizer is None and (files := checkpoint.get("tokenizer")):
            self.tokenizer = Tokenizer.from_files(TokenizerFiles(**files))
        if self._trainer is None:  # set by load_from_checkpoint: no Trainer restores the step
            self._first_step = checkpoint.get("global_step", 0)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Restore the random states at the last moment, because earlier callbacks may draw random numbers."""
        if not self._rng and self.trainer.global_rank and not self.global_step:
            torch.manual_seed(self.config.train.seed + self.trainer.global_rank)  # each its own dropout
        if self.trainer.global_rank < len(self._rng):
            restore_rng(self._rng[self.trainer.global_rank])
        self._rng = []
