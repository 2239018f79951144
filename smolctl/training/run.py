"""`train` and `resume`: a run folder from the first step, and on from any checkpoint."""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from smolctl.config import RunConfig, resolve_run_config
from smolctl.data.batches import StepLoader
from smolctl.data.shards import TokenizedCorpus, TokenizeProgress, tokenize_corpus
from smolctl.data.tokenizer import Tokenizer, load_tokenizer
from smolctl.errors import ExitCode, InputError, UsageError
from smolctl.model.weights import initialize
from smolctl.sources.run_folder import CheckpointFile, RunFolder
from smolctl.training.callbacks import RunCallback, RunContext, StopFlag
from smolctl.training.checkpoint import DurableCheckpointIO, find_damage, read_checkpoint
from smolctl.training.events import End, Listener, Note, Start
from smolctl.training.guards import naming_the_memory_knob
from smolctl.training.loggers import require_packages
from smolctl.training.module import TrainingModule
from smolctl.training.plan import Plan, make_plan, measure_speed
from smolctl.training.prepare import Prepared
from smolctl.training.recorder import RunRecorder, new_run_folder
from smolctl.training.schedule import learning_rate


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    folder: Path
    step: int
    exit_code: ExitCode  # DONE, or INTERRUPTED or TERMINATED by a signal after saving


def plan_run(prepared: Prepared, done: int, disk: Path) -> Plan:
    """What the steps after `done` will cost, measured on the run's own first micro-batch.

    Args:
        prepared: the run.
        done: steps behind it.
        disk: where checkpoints will go; its free space is looked up.
    """
    config = prepared.config
    batch = prepared.dataset()[done][: config.micro_batch_size]
    with naming_the_memory_knob(config.micro_batch_size):
        speed = measure_speed(prepared.network, batch)
    existing = next(path for path in (disk.absolute(), *disk.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    device = "cuda" if _on_gpu(config) else "cpu"
    return make_plan(config, done, len(prepared.corpus.train), speed, free, device)


def train(prepared: Prepared, name: str, out: Path | None, force: bool, emit: Listener) -> RunResult:
    """Start a run in a new folder.

    Args:
        prepared: config, weights, tokenizer and tokens.
        name: of the config; names the folder when `out` is None.
        out: the run folder.
        force: replace the run that `out` holds.
        emit: hears every event.

    Raises:
        SmolError: with the cause; the checkpoints written so far stay.
    """
    plan = plan_run(prepared, 0, out or Path("runs"))
    recorder = RunRecorder(new_run_folder(name, out, force))
    with recorder.lock():
        recorder.describe(prepared.config, prepared.tokenizer)
        return _fit(prepared, recorder, plan, None, emit)


def resume(
    run: Path,
    step: int | None,
    extra: int | None,
    until: int | None,
    emit: Listener,
    on_tokenize: Callable[[TokenizeProgress], None] | None = None,
    *,
    loggers: Sequence[str] | None = None,
) -> RunResult:
    """Continue a run exactly where a checkpoint left it.

    Args:
        run: its folder.
        step: of the checkpoint; None takes the newest whole one.
        extra: steps to do beyond the checkpoint.
        until: or the step to end at. With neither, the steps that the run was planned for.
        emit: hears every event.
        on_tokenize: hears how far the tokenization is, should the cached tokens be gone.
        loggers: `trainer.loggers` from now on; None keeps the run's.

    Raises:
        UsageError: nothing would be left to do.
        InputError: the checkpoint is damaged, or the data or the tokenizer is another one.
    """
    folder = RunFolder.open(run)
    recorder = RunRecorder(folder.path)
    with recorder.lock():
        checkpoint = _sound_checkpoint(folder, step)
        content = read_checkpoint(checkpoint.path)
        config = RunConfig.model_validate(content["hyper_parameters"]["config"])
        config = with_target(with_loggers(config, loggers), checkpoint.step, extra, until)
        require_packages(config.trainer.loggers)
        tokenizer = load_tokenizer(str(folder.path / "tokenizer"))
        corpus = tokenize_corpus(config.data, tokenizer, on_progress=on_tokenize)
        _require_same_data(content["smolctl"], tokenizer, corpus, checkpoint)
        del content  # Lightning reads the file again; two copies need not be in memory
        prepared = Prepared(config, initialize(config.model, config.train.seed), tokenizer, corpus)
        plan = plan_run(prepared, checkpoint.step, folder.path)
        emit(Note(_boundary(config, checkpoint.step)))
        recorder.forget_after(checkpoint.step)
        recorder.write_config(config)
        return _fit(prepared, recorder, plan, checkpoint, emit)


def _sound_checkpoint(folder: RunFolder, step: int | None) -> CheckpointFile:
    """The newest checkpoint or the one asked for, if its bytes are whole.

    Raises:
        InputError: it is damaged, naming the newest one that is not.
    """
    files = folder.checkpoints()
    newest = files[-1].step if files else None
    wanted = newest if step is None else step
    chosen = next((file for file in files if file.step == wanted), None)
    if chosen is None:
        return folder.checkpoint(step)  # raises, saying which steps there are
    damage = find_damage(chosen.path)
    if not damage:
        return chosen
    good = next(
        (file.step for file in reversed(files) if file != chosen and not find_damage(file.path)), None
    )
    hint = (
        "No other checkpoint is whole."
        if good is None
        else f"Go on from: smolctl resume {folder.path}@{good}"
    )
    raise InputError(f"{chosen.path}: {damage}", hint)


def with_target(config: RunConfig, done: int, extra: int | None, until: int | None) -> RunConfig:
    """The config with the step to end at.

    Raises:
        UsageError: both or senseless numbers were given, or no step would be left to do.
    """
    if extra is not None and until is not None:
        raise UsageError("--extra and --until exclude each other", "Give one of them.")
    target = done + extra if extra is not None else until or config.train.steps
    if target <= done:
        raise UsageError(
            f"the run is at step {done} already and would end at {target}: nothing to do",
            "Say how much more with --extra N.",
        )
    return resolve_run_config(
        {**config.model_dump(), "train": {**config.train.model_dump(), "steps": target}}, origin="resume"
    )


def with_loggers(config: RunConfig, loggers: Sequence[str] | None) -> RunConfig:
    """The config with other loggers; None keeps its own.

    Raises:
        InputError: there is no logger of that name.
    """
    if loggers is None:
        return config
    trainer = {**config.trainer.model_dump(), "loggers": tuple(loggers)}
    return resolve_run_config({**config.model_dump(), "trainer": trainer}, origin="--logger")


def _boundary(config: RunConfig, done: int) -> str:
    """What the learning rate does where the run goes on, and at its end."""
    steps = (done, done + 1, config.train.steps)
    rates = [learning_rate(step, config.optimizer.learning_rate, config.schedule) for step in steps]
    planned = (config.schedule.decay_start or 0) + int(config.schedule.decay_steps)
    idle = rates[1] == rates[2] == 0
    warning = " Nothing will be learned: the schedule has come to its end, at 0." if idle else ""
    past = f" (the schedule ends at step {planned:,})" if done < planned < config.train.steps else ""
    return (
        f"Learning rate: {rates[0]:.3g} at step {steps[0]:,}, {rates[1]:.3g} at step {steps[1]:,}, "
        f"{rates[2]:.3g} at step {steps[2]:,}{past}.{warning}"
    )


def _require_same_data(
    state: dict[str, Any], tokenizer: Tokenizer, corpus: TokenizedCorpus, checkpoint: CheckpointFile
) -> None:
    if state["tokenizer"] != tokenizer.sha256:
        raise InputError(
            f"{checkpoint.path}: the run's tokenizer folder holds another tokenizer than it was trained with",
            "Put the tokenizer back, or start anew from these weights: smolctl train --init-from RUN.",
        )
    if state["data"] != corpus.fingerprint:
        raise InputError(
            f"{checkpoint.path}: the corpus is not the one that the run was trained on",
            "Put the files back, or start anew from these weights: smolctl train --init-from RUN --data …",
        )


def _fit(
    prepared: Prepared, recorder: RunRecorder, plan: Plan, checkpoint: CheckpointFile | None, emit: Listener
) -> RunResult:
    """Run Lightning from step 0 or from a checkpoint to the config's last step."""
    config = prepared.config
    _silence_lightning()
    pl.seed_everything(config.train.seed, verbose=False)
    done = checkpoint.step if checkpoint is not None else 0
    stop = StopFlag()
    callback = RunCallback(
        RunContext(config, recorder, prepared.tokenizer, prepared.corpus, emit), stop, saved_at=done or None
    )
    trainer = pl.Trainer(
        max_steps=config.train.steps,
        max_epochs=-1,
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=config.trainer.strategy,
        precision=_precision(config),
        callbacks=[callback],
        plugins=[DurableCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    state = {"data": prepared.corpus.fingerprint, "tokenizer": prepared.tokenizer.sha256}
    module = TrainingModule(prepared.network.train(), config, state)
    if config.train.compile:
        for block in prepared.network.model.layers:
            block.compile()  # in place: the names in the checkpoint stay clean
    dataset = prepared.dataset(trainer.global_rank, trainer.world_size)
    loader = StepLoader(dataset, done, config.train.steps, config.data.workers)
    emit(Start(str(recorder.folder), done, config.train.steps, plan))
    started = time.perf_counter()
    with warnings.catch_warnings(), naming_the_memory_knob(config.micro_batch_size):
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(
            module, loader, ckpt_path=checkpoint.path if checkpoint is not None else None, weights_only=True
        )
    step = trainer.global_step
    reason = stop.received.name if stop.received is not None else "done"
    emit(End(step, str(recorder.folder), reason, time.perf_counter() - started))
    if reason == "done" and step != config.train.steps:
        raise InputError(f"the run ended at step {step} of {config.train.steps}", "Resume it; this is a bug.")
    codes = {"SIGINT": ExitCode.INTERRUPTED, "SIGTERM": ExitCode.TERMINATED}
    return RunResult(recorder.folder, step, codes.get(reason, ExitCode.DONE))


def _on_gpu(config: RunConfig) -> bool:
    return torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu", "cuda")


def _precision(config: RunConfig) -> Literal["32-true", "bf16-mixed", "bf16-true"]:
    """bf16 where the device computes in it, float32 elsewhere: a CPU emulates bf16, slowly."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16-mixed" if _on_gpu(config) and torch.cuda.is_bf16_supported() else "32-true"


def _silence_lightning() -> None:
    """Lightning's own lines about devices and tips would cut through the display."""
    torch.set_float32_matmul_precision("high")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
