"""Runs Lightning's trainer from one step to another."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Literal

from smolctl.config.run import MOST_STEPS
from smolctl.data.batches import StepLoader
from smolctl.durable import explaining_disk_errors
from smolctl.errors import ExitCode, InputError
from smolctl.runs.events import Listener
from smolctl.runs.folder import RunFolder
from smolctl.runs.layout import CHECKPOINTS
from smolctl.training.callbacks import RunCallback
from smolctl.training.checkpoint import DurableCheckpointIO
from smolctl.training.clock import Clock, tasks_of
from smolctl.training.distributed import is_main_process, wait_for_all
from smolctl.training.guards import explaining_memory_errors
from smolctl.training.lightning import Trainer, pl
from smolctl.training.module import TrainingModule
from smolctl.training.prepare import Prepared
from smolctl.training.process import prepare_process
from smolctl.training.stopping import EXIT_CODES, StopFlag
from smolctl.training.tolerance import Tolerance

# The module itself scales float16's gradients, and clipping needs them unscaled.
LIGHTNING_PRECISION: Mapping[str, Literal["32-true", "bf16-mixed", "bf16-true"]] = {
    "32-true": "32-true",
    "bf16-mixed": "bf16-mixed",
    "bf16-true": "bf16-true",
    "16-mixed": "32-true",
}


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    folder: Path
    step: int
    exit_code: ExitCode  # DONE, or the signal's code after saving; only set in the main process


def fit(prepared: Prepared, run: RunFolder, start: Path | None, emit: Listener) -> RunResult:
    """Train from the first step, or from a checkpoint, to the last step of the config.

    Args:
        prepared: the run.
        run: its folder.
        start: the checkpoint; None starts at step 0.
        emit: gets every event in the main process.
    """
    wait_for_all(prepared.identity)  # may take long: until here a signal ends the process immediately
    started, minutes, clock = time.perf_counter(), prepared.config.train.minutes, None
    if minutes and start is None:  # a resumed run keeps its number of steps
        clock = Clock(60 * minutes, tasks_of(prepared.config, len(prepared.corpus.validation or ())))
    with explaining_disk_errors(run.path), StopFlag() as stop:
        callback = RunCallback(prepared, run, emit, stop, clock)
        trainer, _ = run_trainer(prepared, callback, run.path, start, clock is not None)
        step, last = trainer.global_step, callback.config.train.steps
        signal = Signals(callback.stopped_by) if callback.stopped_by else None
        if is_main_process():
            if signal is None or step == last:
                with Tolerance(emit)("giving the last checkpoint the name final.ckpt", step):
                    run.name_final(step)
            reason = signal.name if signal else "patience" if callback.out_of_patience else "done"
            emit(callback.end(trainer, reason, time.perf_counter() - started))
    if signal is None and step != last and not callback.out_of_patience:
        raise InputError(f"the run ended at step {step} of {last}", "Resume it; this is a bug.")
    # A launcher treats any exit code except 0 as a failure, and would kill this process.
    return RunResult(run.path, step, EXIT_CODES[signal] if signal and is_main_process() else ExitCode.DONE)


def run_trainer(
    prepared: Prepared, callback: pl.Callback, folder: Path, start: Path | None, open_end: bool = False
) -> tuple[pl.Trainer, TrainingModule]:
    """Run Lightning's loop over the remaining steps, with one callback around them.

    Args:
        prepared: the run.
        callback: called at every step.
        folder: of the run.
        start: the checkpoint to start from, or None.
        open_end: whether the callback determines the last step.

    Raises:
        NonFiniteError: the loss or gradient of a step is not finite.
        MemoryShortageError: a step does not fit into memory.
    """
    config = prepared.config
    prepare_process(config.trainer.deterministic)
    pl.seed_everything(config.train.seed, verbose=False)
    trainer = Trainer(
        # Under SLURM, Lightning starts from any hpc_ckpt_*.ckpt that it finds there.
        default_root_dir=folder / CHECKPOINTS,
        max_steps=-1 if open_end else config.train.steps,
        max_epochs=-1,
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=config.trainer.strategy,
        precision=LIGHTNING_PRECISION[config.train.precision],
        # CPUs are always deterministic.
        deterministic=(config.trainer.accelerator == "cuda" and config.trainer.deterministic) or None,
        callbacks=[callback],
        plugins=[DurableCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    module = TrainingModule(config, prepared, trainer.global_rank, trainer.world_size)
    assert module.dataset is not None
    if config.train.compile:
        prepared.network.compile_blocks()
    end = MOST_STEPS if open_end else config.train.steps
    loader = StepLoader(module.dataset, prepared.first_step, end, config.data.workers)
    with warnings.catch_warnings(), explaining_memory_errors(config.micro_batch_size):
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(
            module, loader, ckpt_path=None if prepared.begins_with_origin else start, weights_only=True
        )
    return trainer, module
