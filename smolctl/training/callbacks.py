"""What happens around a step: records, checkpoints, validation, predictions, signals."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from smolctl.config import RunConfig
from smolctl.data.batches import validation_batches
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokens.corpus import TokenizedCorpus
from smolctl.evaluation import bits_per_byte
from smolctl.runs.events import Checkpoint, Event, Listener, Step, Validation, to_json
from smolctl.runs.folder import RunFolder
from smolctl.runs.records import RunRecorder
from smolctl.timing import peak_memory
from smolctl.training.device import flops_utilization, run_peak_flops
from smolctl.training.distributed import from_main, gather
from smolctl.training.lightning import pl
from smolctl.training.loggers import MetricLoggers, Opening
from smolctl.training.module import TrainingModule
from smolctl.training.predictions import observing, predict
from smolctl.training.tolerance import Tolerance, shortened

# Steps over which the displayed speed is averaged: enough to be calm, few enough to follow a change.
SPEED_WINDOW = 20


@dataclass(frozen=True)
class RunContext:
    """What the callbacks need to know about the run around them."""

    config: RunConfig
    recorder: RunRecorder
    tokenizer: Tokenizer
    corpus: TokenizedCorpus
    emit: Listener


class StopFlag:
    """Remembers a SIGINT or SIGTERM until the step at hand is done; a second one stops at once."""

    def __init__(self) -> None:
        self.received = ""  # name of the signal
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take over both signals; only possible in the main thread, and left alone elsewhere."""
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:
            self._previous.clear()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            self.restore()
            raise SystemExit(128 + number)  # Lightning would turn KeyboardInterrupt into exit code 1
        self.received = signal.Signals(number).name


class RunCallback(pl.Callback):
    """After every step: record it, then save, then look at the model, then heed a signal.

    Saving comes first: nothing that can fail afterwards costs more than itself.
    """

    def __init__(self, context: RunContext, stop: StopFlag, saved_at: int | None = None) -> None:
        self.context = context
        self.stop = stop
        self.saved_at = saved_at  # step of the newest checkpoint
        self.folder = context.recorder.folder  # the main process's, once training has started
        self._durations: deque[float] = deque(maxlen=SPEED_WINDOW)
        self._step_started = 0.0
        self._peak_flops: float | None = None
        self._tolerating = Tolerance(context.emit)
        self._loggers = MetricLoggers(context.emit)
        lengths = context.tokenizer.token_byte_lengths()
        vocabulary = context.config.model.vocab_size
        self._token_bytes = torch.zeros(max(vocabulary, len(lengths)), dtype=torch.long)
        self._token_bytes[: len(lengths)] = torch.from_numpy(lengths)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device, precision = trainer.strategy.root_device, str(trainer.precision)
        self._peak_flops = run_peak_flops(device, precision, trainer.world_size)
        if trainer.is_global_zero:
            config, recorder = self.context.config, self.context.recorder
            opening = Opening(recorder.folder, config, self.saved_at or 0, recorder.metrics())
            self._loggers.open(config.trainer.loggers, opening)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.install()  # after Lightning has installed its own
        self.folder = Path(from_main(str(self.context.recorder.folder), trainer))
        if trainer.global_step == 0:
            self._save(trainer)  # shows before step 1 that a checkpoint can be written and read
            self._predict(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._record_step(trainer, pl_module)
        step, config = trainer.global_step, self.context.config
        last = step >= config.train.steps
        # A signal may reach one process only; all of them stop for the same one.
        signals = [name for name in gather(self.stop.received, trainer) if name]
        stopping = bool(signals)
        self.stop.received = signals[0] if signals else ""
        if last or stopping or step % config.checkpoint.every == 0:
            self._save(trainer)
        if _is_due(step, config.validation.every, last and not stopping):
            self._validate(trainer, pl_module)
        if _is_due(step, config.predictions.every, last and not stopping):
            self._predict(trainer, pl_module)
        if (last or stopping or step % config.checkpoint.every == 0) and trainer.is_global_zero:
            with self._tolerating("drawing loss.png", step):
                self.context.recorder.draw_loss()
        if stopping:
            trainer.should_stop = True

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, Exception):  # a second signal does not wait for anybody
            self._loggers.close(trainer.global_step, "failed")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._loggers.close(trainer.global_step, "success")
        self.stop.restore()

    def _publish(self, trainer: pl.Trainer, event: Event) -> None:
        if trainer.is_global_zero:
            self.context.recorder.record(event)
            self._loggers.log(to_json(event))
            self.context.emit(event)

    def _record_step(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        assert module.result is not None
        seconds = time.perf_counter() - self._step_started
        self._durations.append(seconds)
        mean = sum(self._durations) / len(self._durations)
        config, step = self.context.config, trainer.global_step
        speed = config.tokens_per_step / mean
        self._publish(
            trainer,
            Step(
                step=step,
                loss=module.result.loss,
                learning_rate=module.result.learning_rate,
                gradient_norm=module.result.gradient_norm,
                tokens=module.dataset.samples_before(step) * config.data.sequence_length,
                seconds=seconds,
                tokens_per_second=speed,
                eta_s=(config.train.steps - step) * mean,
                memory_bytes=peak_memory(trainer.strategy.root_device),
                mfu=flops_utilization(config, speed, self._peak_flops),
            ),
        )

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if self.saved_at == step:
            return
        started = time.perf_counter()
        path = self.folder / "checkpoints" / f"step-{step:06d}.ckpt"
        trainer.save_checkpoint(path)
        self.saved_at = step
        if trainer.is_global_zero:
            remove_old_checkpoints(
                self.context.recorder.folder,
                self.context.config,
                trainer.strategy.checkpoint_io.remove_checkpoint,
            )
            seconds = time.perf_counter() - started
            self._publish(trainer, Checkpoint(step, str(path), path.stat().st_size, seconds))

    def _validate(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        context, held_out = self.context, self.context.corpus.validation
        if held_out is None or not trainer.is_global_zero:
            return
        config, step, result = context.config, trainer.global_step, None
        with self._tolerating("the validation", step), observing(module.network):
            batches = validation_batches(
                held_out, config.data.sequence_length, config.micro_batch_size, config.validation.batches
            )
            result = bits_per_byte(module.network, batches, self._token_bytes, module.dataset.document_end)
        if result is not None:
            self._publish(trainer, Validation(step, result.bits_per_byte, result.standard_error, result.loss))

    def _predict(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        context, step = self.context, trainer.global_step
        config = context.config.predictions
        if not config.every or not trainer.is_global_zero:
            return
        for prompt in config.prompts:
            prediction = None
            with self._tolerating(f"the prediction for {shortened(prompt)!r}", step):
                prediction = predict(module.network, context.tokenizer, config, prompt, step)
            if prediction is not None:
                self._publish(trainer, prediction)
        with self._tolerating("writing predictions.md", step):
            context.recorder.write_story()


def _is_due(step: int, every: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


def remove_old_checkpoints(folder: Path, config: RunConfig, remove: Callable[[Path], None]) -> None:
    """Keep the newest `keep_last` checkpoints and those at multiples of `keep_every`."""
    keep_last, keep_every = config.checkpoint.keep_last, config.checkpoint.keep_every
    if not keep_last:
        return
    for checkpoint in RunFolder(folder).checkpoints()[:-keep_last]:
        if not (keep_every and checkpoint.step and checkpoint.step % keep_every == 0):
            remove(checkpoint.path)
