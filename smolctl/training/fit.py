"""Lightning's part of a run: a trainer that goes from one step to another, and nothing around it."""

from __future__ import annotations

import ctypes
import logging
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from smolctl.data.batches import StepLoader
from smolctl.durable import naming_the_disk
from smolctl.errors import ExitCode, InputError
from smolctl.runs.events import End, Listener, RunPlan, Start
from smolctl.runs.records import RunRecorder
from smolctl.training.callbacks import RunCallback, RunContext, StopFlag
from smolctl.training.checkpoint import DurableCheckpointIO
from smolctl.training.device import resolved_precision
from smolctl.training.distributed import is_main_process
from smolctl.training.guards import naming_the_memory_knob
from smolctl.training.lightning import pl
from smolctl.training.module import TrainingModule
from smolctl.training.prepare import Prepared

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

EXIT_CODES = {"SIGINT": ExitCode.INTERRUPTED, "SIGTERM": ExitCode.TERMINATED}


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    folder: Path
    step: int
    exit_code: ExitCode  # DONE, or INTERRUPTED or TERMINATED by a signal after saving


def fit(
    prepared: Prepared,
    recorder: RunRecorder,
    plan: RunPlan | None,
    start: Path | None,
    emit: Listener,
) -> RunResult:
    """Train from the first step, or from a checkpoint, to the config's last step.

    Args:
        prepared: the run.
        recorder: of its folder.
        plan: what the steps will cost; None in processes that keep no records.
        start: the checkpoint; None begins at step 0.
        emit: hears every event, in the main process.
    """
    config = prepared.config
    stop = StopFlag()
    context = RunContext(config, recorder, prepared.tokenizer, prepared.corpus, emit)
    callback = RunCallback(context, stop, saved_at=prepared.first_step or None)
    if plan is not None:
        emit(Start(str(recorder.folder), prepared.first_step, config.train.steps, plan))
    started = time.perf_counter()
    with naming_the_disk(recorder.folder):
        trainer, _ = run_trainer(prepared, callback, start)
    step = trainer.global_step
    reason = stop.received or "done"
    if is_main_process():
        emit(End(step, str(recorder.folder), reason, time.perf_counter() - started))
    if reason == "done" and step != config.train.steps:
        raise InputError(f"the run ended at step {step} of {config.train.steps}", "Resume it; this is a bug.")
    return RunResult(recorder.folder, step, EXIT_CODES.get(reason, ExitCode.DONE))


def run_trainer(
    prepared: Prepared, callback: pl.Callback, start: Path | None
) -> tuple[pl.Trainer, TrainingModule]:
    """Run Lightning's loop over the steps that are left, with one callback around them.

    Raises:
        NonFiniteError: at a step whose loss or gradient is no number.
        MemoryShortageError: a step does not fit.
    """
    config = prepared.config
    prepare_process()
    pl.seed_everything(config.train.seed, verbose=False)
    trainer = pl.Trainer(
        max_steps=config.train.steps,
        max_epochs=-1,
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=config.trainer.strategy,
        precision=resolved_precision(config),
        callbacks=[callback],
        plugins=[DurableCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    dataset = prepared.dataset(trainer.global_rank, trainer.world_size)
    module = TrainingModule(prepared.network.train(), config, dataset, prepared.fingerprints)
    if config.train.compile:
        prepared.network.compile_blocks()
    loader = StepLoader(dataset, prepared.first_step, config.train.steps, config.data.workers)
    with warnings.catch_warnings(), naming_the_memory_knob(config.micro_batch_size):
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, loader, ckpt_path=start, weights_only=True)
    return trainer, module


def prepare_process() -> None:
    """Set what holds for the whole process: the allocator, the precision of products, a silent Lightning.

    Lightning's own lines about devices and tips would cut through the display.
    """
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step instead of giving it back to the system.

    By default every large tensor is mapped and unmapped anew, and the system clears every page of it:
    over a tenth of a step's time on a CPU (benchmarks/README.md). Elsewhere than on glibc it does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
