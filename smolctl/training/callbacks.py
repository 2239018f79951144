"""The work around each step: records, checkpoints, validation, predictions, signals."""

from __future__ import annotations

import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from smolctl.config import RunConfig
from smolctl.data.batches import sequences_of, validation_batches, validation_documents
from smolctl.durable import DISK_ERRORS
from smolctl.evaluation import bits_per_byte
from smolctl.runs.events import Checkpoint, End, Event, Listener, Note, Step, Validation, to_json
from smolctl.runs.folder import RunFolder
from smolctl.runs.layout import is_run
from smolctl.runs.retention import remove_old_checkpoints
from smolctl.runs.root import make_latest
from smolctl.timing import peak_memory
from smolctl.training.checkpoint import LEAVE, SaveError, drop_weights
from smolctl.training.clock import Clock
from smolctl.training.device import describe_environment, flops_utilization, run_peak_flops
from smolctl.training.distributed import from_main, largest
from smolctl.training.lightning import pl
from smolctl.training.loggers import MetricLoggers, Opening
from smolctl.training.module import TrainingModule
from smolctl.training.optim.schedule import phase
from smolctl.training.predictions import observing, predict
from smolctl.training.prepare import Prepared
from smolctl.training.stopping import StopFlag
from smolctl.training.tolerance import LATEST_LINK, Tolerance, shortened

# Steps over which the displayed speed is averaged: enough to be steady, few enough to follow a change.
SPEED_WINDOW = 20
SECONDS_BETWEEN_PICTURES = 10.0  # of the loss; drawing takes 0.1 s, more than a small checkpoint


class RunCallback(pl.Callback):
    """After every step: record it, then save, then observe the model, then handle a signal.

    Saving comes first, so that a later failure costs nothing else. A checkpoint therefore does not contain
    the score of its own step, unless it was saved because of that score: a resumed run looks the score up or
    computes it.
    """

    def __init__(
        self,
        prepared: Prepared,
        run: RunFolder,
        emit: Listener,
        stop: StopFlag,
        clock: Clock | None = None,
    ) -> None:
        self.prepared, self.config = prepared, prepared.config
        self.run = run  # in the main process, after training has started
        self.emit = emit
        self.stop = stop
        self._clock = clock  # of train.minutes, if that determines the number of steps
        self.stopped_by = 0  # number of the signal at which all processes have agreed to stop
        self.saved_at = prepared.first_step or None  # step of the newest checkpoint
        self.out_of_patience = False  # of `train.patience`
        self._last_step: Step | None = None
        self._last_validation: Validation | None = None
        self._durations: deque[float] = deque(maxlen=SPEED_WINDOW)
        self._step_started = 0.0
        self._drawn_at = time.monotonic()
        self._peak_flops: float | None = None
        self._tolerance = Tolerance(emit)
        self._loggers = MetricLoggers(emit)
        lengths = prepared.tokenizer.token_byte_lengths()
        vocabulary = self.config.model.vocab_size
        self._token_bytes = torch.zeros(max(vocabulary, len(lengths)), dtype=torch.long)
        self._token_bytes[: len(lengths)] = torch.from_numpy(lengths)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.stop.all_processes_started()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device, precision = trainer.strategy.root_device, self.config.train.precision
        self._peak_flops = run_peak_flops(device, precision, trainer.world_size)
        if trainer.is_global_zero:
            opening = Opening(self.run.path, self.config, self.saved_at or 0, self.run.metrics())
            self._loggers.open(self.config.trainer.loggers, opening)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.run = RunFolder(Path(from_main(str(self.run.path), trainer)))
        if self._clock is not None:  # each process has measured its own number of steps
            assert isinstance(pl_module, TrainingModule)
            self._set_config(
                pl_module, RunConfig.model_validate(from_main(self.config.model_dump(), trainer))
            )
        if trainer.global_step == 0:
            self._save(trainer)  # checks before step 1 that a checkpoint can be written and read
            if trainer.is_global_zero:
                with self._tolerance(LATEST_LINK, 0):
                    make_latest(self.run.path)
        if self._stopping(trainer):
            return
        if trainer.global_step == 0:
            self._predict(trainer, pl_module)
        elif _is_due(trainer.global_step, self.config.validation.every, False):
            assert isinstance(pl_module, TrainingModule)
            self._validate(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._record_step(trainer, pl_module)
        self._adjust_end(trainer, pl_module)
        step, config = trainer.global_step, self.config
        last = step >= config.train.steps
        stopping = self._stopping(trainer)
        if last or stopping or step % config.checkpoint.every == 0:
            self._save(trainer)
        if not stopping and _is_due(step, config.validation.every, last):
            improved = self._validate(trainer, pl_module)
            last = last or self.out_of_patience
            if last or (improved and config.checkpoint.keep_best):
                self._save(trainer)
                self._remove_old_checkpoints(trainer)
        if _is_due(step, config.predictions.every, last and not stopping):
            self._predict(trainer, pl_module)
        due = last or stopping or (self.saved_at == step and self._drawing_is_due())
        if due and trainer.is_global_zero:
            with self._tolerance("drawing loss.png", step):
                self.run.draw_loss()
            with self._tolerance("writing report.html", step):
                self.run.write_report()
            self._drawn_at = time.monotonic()
        if last:
            trainer.should_stop = True

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, Exception):  # a second signal does not wait for other processes
            self._loggers.close(trainer.global_step, "failed")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._loggers.close(trainer.global_step, "success")

    def end(self, trainer: pl.Trainer, reason: str, seconds: float) -> End:
        """Record the end of the run and its result, in the main process."""
        step, scored, last = trainer.global_step, self._last_validation, self._last_step
        scored = scored if scored is not None and scored.step == step else None
        best = self.run.best_validation()
        tokens = self.prepared.first_sample * self.config.data.sequence_length
        return End(
            step=step,
            run=str(self.run.path),
            reason=reason,
            seconds=seconds,
            loss=last.loss if last else None,
            bits_per_byte=scored.bits_per_byte if scored else None,
            standard_error=scored.standard_error if scored else None,
            margin=scored.margin if scored else None,
            best_step=best["step"] if best else None,
            best_bits_per_byte=best["bits_per_byte"] if best else None,
            best_is_kept=best is not None and self.run.checkpoint_path(best["step"]).is_file(),
            tokens=last.tokens if last else tokens,
            memory_bytes=peak_memory(trainer.strategy.root_device),
            config_sha256=self.run.config_sha256(),
        )

    def _drawing_is_due(self) -> bool:
        return time.monotonic() - self._drawn_at > SECONDS_BETWEEN_PICTURES

    def _adjust_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Move the end of a run of train.minutes to the time limit, and record it."""
        if self._clock is None:
            return
        step, config, until = trainer.global_step, self.config, self.config.train.steps
        if trainer.is_global_zero:
            until = self._clock.steps(step, until)
        until = from_main(until, trainer)
        if until != config.train.steps:
            self._set_config(module, config.with_end(step, until))
            if trainer.is_global_zero:
                self.run.write_config(self.config)

    def _set_config(self, module: TrainingModule, config: RunConfig) -> None:
        self.config = module.config = config

    def _timed(self, task: str) -> AbstractContextManager[None]:
        return self._clock.timed(task) if self._clock else nullcontext()

    def _stopping(self, trainer: pl.Trainer) -> bool:
        """Whether at least one process has received a signal: all processes get the same result and stop
        at this step.
        """
        self.stopped_by = largest(self.stop.received, trainer)
        trainer.should_stop = self.stopped_by > 0
        return trainer.should_stop

    def _publish(self, trainer: pl.Trainer, event: Event) -> None:
        if trainer.is_global_zero:
            self._record(event, trainer.global_step)
            self._loggers.log(to_json(event))
            self.emit(event)

    def _record(self, event: Event, step: int) -> None:
        try:
            self.run.record(event)
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise  # the next checkpoint would fail in the same way
            with self._tolerance(f"writing {Path(error.filename).name}", step):
                raise

    def _record_step(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        assert module.result is not None
        assert module.dataset is not None
        seconds = time.perf_counter() - self._step_started
        self._durations.append(seconds)
        mean = sum(self._durations) / len(self._durations)
        config, step = self.config, trainer.global_step
        speed = config.tokens_per_step / mean
        self._last_step = Step(
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
            skipped=module.skipped,
            phase=phase(step, config.schedule),
            z_loss=module.result.z_loss,
            until=config.train.steps if self._clock else None,
        )
        self._publish(trainer, self._last_step)

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if self.saved_at == step:
            return
        with self._timed("save"):
            self._write_checkpoint(trainer, step)

    def _write_checkpoint(self, trainer: pl.Trainer, step: int) -> None:
        started = time.perf_counter()
        path = self.run.checkpoint_path(step)
        trainer.save_checkpoint(path)
        self.saved_at = step
        if trainer.is_global_zero:
            if not is_run(self.run.path):
                self._describe_again(step)
            origin = self.config.init_from
            if step == 0 and origin is not None and origin.sha256:
                drop_weights(path)  # the model from which the run started contains them
            self._remove_old_checkpoints(trainer)
            seconds = time.perf_counter() - started
            if not path.exists():
                raise SaveError(f"{path}: was removed while the run was saving", LEAVE)
            self._publish(trainer, Checkpoint(step, str(path), path.stat().st_size, seconds))

    def _describe_again(self, step: int) -> None:
        """Write the folder's record again, after somebody moved or deleted the folder."""
        moved = f"step {step:,}: {self.run.path} was moved or deleted"
        self.emit(Note(f"{moved}; the run continues in a new folder there."))
        prepared = self.prepared
        environment = describe_environment(self.config, prepared.decisions, prepared.corpus.read)
        self.run.describe(self.config, environment, prepared.tokenizer.save)

    def _remove_old_checkpoints(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            remove_old_checkpoints(self.run, self.config.checkpoint)

    def _validate(self, trainer: pl.Trainer, module: TrainingModule) -> bool:
        """Score the held-out text, and end a run that has not improved for too long.

        Returns:
            Whether the model is the best so far; all processes return the same.
        """
        progress, step, patience = module.progress, trainer.global_step, self.config.train.patience
        improved = False
        with self._timed("validate"):
            found = self._score(trainer, module)
        if found is not None:
            score, tokens = found
            progress = progress.on_text(tokens)
            improved = progress.is_improved_by(score)
            if step % self.config.validation.every == 0 and step > progress.step:
                progress = module.progress = progress.after(step, score)
        self.out_of_patience = bool(largest(0 < patience <= progress.since, trainer))
        if self.out_of_patience:
            trainer.should_stop = True
            if trainer.is_global_zero:
                self.emit(
                    Note(
                        f"Stopped by train.patience: {progress.since} validations in a row were no better "
                        f"than {progress.bits_per_byte:.4f} bits/byte at step {progress.best_step:,}. "
                        f"--set train.patience={2 * patience} lets `resume` continue."
                    )
                )
        return bool(largest(improved, trainer))

    def _score(self, trainer: pl.Trainer, module: TrainingModule) -> tuple[float, int] | None:
        """Bits per byte of the held-out text and its tokens; None without held-out text, and outside the
        main process.
        """
        held_out = self.prepared.corpus.validation
        if held_out is None or not trainer.is_global_zero:
            return None
        config, step, result = self.config, trainer.global_step, None
        which = (
            held_out,
            config.data.sequence_length,
            config.micro_batch_size,
            config.validation.sequences,
        )
        end = self.prepared.document_end
        with self._tolerance("the validation", step), observing(module.network):
            batches = list(validation_batches(*which))
            tokens = sum(int(sequences_of(batch, end).trained_tokens) for batch in batches)
            recorded = self.run.best_validation({step}) if step == self.prepared.first_step else None
            if recorded and recorded.get("tokens", tokens) == tokens:
                return recorded["bits_per_byte"], tokens
            documents = validation_documents(*which, self.prepared.tokenizer.end_of_text_id)
            result = bits_per_byte(module.network, batches, self._token_bytes, end, documents)
        if result is None:
            return None
        self._last_validation = Validation(step, **vars(result), tokens=tokens)
        self._publish(trainer, self._last_validation)
        return result.bits_per_byte, tokens

    def _predict(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        with self._timed("predict"):
            self._show_predictions(trainer, module)

    def _show_predictions(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        config, step = self.config.predictions, trainer.global_step
        if not config.every or not trainer.is_global_zero:
            return
        for prompt in config.prompts:
            prediction = None
            with self._tolerance(f"the prediction for {shortened(prompt)!r}", step):
                prediction = predict(
                    module.network, self.prepared.tokenizer, config, prompt, step, self.config.data.is_chat
                )
            if prediction is not None:
                self._publish(trainer, prediction)
        with self._tolerance("writing predictions.md", step):
            self.run.write_predictions()


def _is_due(step: int, every: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)
