"""`resume --verify`: repeats the steps before a checkpoint and compares the result bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolctl.data.tokens.corpus import TokenizeProgress
from smolctl.errors import ExitCode, InputError, UsageError
from smolctl.runs.checkpoint_file import CheckpointFile, holds_weights, read_checkpoint
from smolctl.runs.events import Listener, Note
from smolctl.runs.folder import RunFolder
from smolctl.training.distributed import wait_for_all, with_process_counts
from smolctl.training.fit import run_trainer
from smolctl.training.lightning import pl
from smolctl.training.module import StepResult, TrainingModule
from smolctl.training.prepare import prepare_again
from smolctl.training.resume import (
    ResumeOptions,
    decisions_of,
    find_run,
    require_same_data,
    tokenizer_of,
)
from smolctl.training.state import run_of


@dataclass(frozen=True)
class Verification:
    """Whether a run, repeated from one checkpoint, reproduces the next one."""

    run: str
    first: int  # step of the first checkpoint
    last: int  # step of the compared checkpoint
    tensors: int  # number compared: weights, optimizer state, random states
    losses: int  # steps whose loss, gradient norm and learning rate were compared
    differences: tuple[str, ...]  # the first few; empty if everything is equal bit for bit

    @property
    def exact(self) -> bool:
        """Whether there is no difference."""
        return not self.differences

    @property
    def exit_code(self) -> ExitCode:
        """DONE, or GATE_NOT_MET if there is a difference."""
        return ExitCode.DONE if self.exact else ExitCode.GATE_NOT_MET


def verify(
    run: Path,
    options: ResumeOptions,
    emit: Listener,
    on_tokenize: Callable[[TokenizeProgress], None] | None = None,
) -> Verification:
    """Repeat the steps between two checkpoints and compare. Nothing is written.

    Args:
        run: its folder.
        options: `step` to start from (default: the second newest checkpoint), `until` to end at (default: the
            newest checkpoint). Changed settings are refused, because the result would prove nothing.
        emit: called with every event.
        on_tokenize: called with the progress of tokenization if the cached tokens are missing.

    Raises:
        UsageError: options that do not apply here.
        InputError: there are not two intact checkpoints, or the data or the tokenizer differs.
    """
    if options.settings or options.extra or options.out:
        raise UsageError(
            "--verify repeats a run without changes", "Combine it only with RUN@STEP and --until."
        )
    folder, step = find_run(run, options.step)
    if folder is None:
        raise UsageError(
            f"{run}: --verify needs the run folder that the checkpoint was written in", "Name the run."
        )
    end = folder.checkpoint(options.until)
    start = _start(folder, end, step)
    begin, content = read_checkpoint(start.path), read_checkpoint(end.path)
    _, state = run_of(begin, start.path)
    config, recorded_state = run_of(content, end.path)
    steps = config.train.model_copy(update={"steps": end.step})
    config = with_process_counts(config.model_copy(update={"train": steps}))
    tokenizer = tokenizer_of(content, folder, end.path)
    decisions, has_weights = decisions_of(state), holds_weights(begin)
    del begin
    prepared = prepare_again(config, tokenizer, decisions, start.step, state, emit, on_tokenize, has_weights)
    require_same_data(recorded_state, prepared, end)
    emit(Note(f"Repeating steps {start.step + 1:,} to {end.step:,} from {start.path}."))
    watcher = _Watcher()
    wait_for_all(prepared.identity)
    try:
        trainer, module = run_trainer(prepared, watcher, folder.path, start.path)
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # Lightning turns it into exit code 1
            raise KeyboardInterrupt from None
        raise
    again = {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "random states": watcher.smolctl["rng"],
    }
    before = {
        "weights": content["state_dict"],
        "optimizer": content["optimizer_states"][0],
        "random states": recorded_state["rng"],
    }
    recorded = _recorded(folder, start.step, end.step, bool(config.train.z_loss))
    differences = [*_loss_differences(recorded, watcher.results), *_differences(before, again, "")]
    compared = sum(isinstance(leaf, torch.Tensor) for leaf in _leaves(before))
    return Verification(
        str(folder.path), start.step, end.step, compared, len(recorded), tuple(differences[:10])
    )


def _start(folder: RunFolder, end: CheckpointFile, step: int | None) -> CheckpointFile:
    if step is not None:
        start = folder.checkpoint(step)
        if start.step >= end.step:
            raise UsageError(f"step {start.step} is not before step {end.step}", "Name an older step.")
        return start
    older = [file for file in folder.checkpoints() if file.step < end.step and not file.damage]
    if not older:
        raise InputError(
            f"{folder.path}: no good checkpoint before step {end.step:,} to repeat the run from",
            "Keep more than one with checkpoint.keep_last.",
        )
    return older[-1]


class _Watcher(pl.Callback):
    """Records every step, and the state after the last one."""

    def __init__(self) -> None:
        self.results: dict[int, StepResult] = {}
        self.smolctl: dict[str, Any] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        assert pl_module.result is not None
        self.results[trainer.global_step] = pl_module.result
        if trainer.global_step == trainer.max_steps:
            kept: dict[str, Any] = {}
            pl_module.on_save_checkpoint(kept)
            self.smolctl = kept["smolctl"]


def _recorded(folder: RunFolder, first: int, last: int, has_z_loss: bool) -> dict[int, StepResult]:
    """The steps after `first` up to `last` in metrics.jsonl.

    A step recorded when the loss still included the z-loss is left out.
    """
    return {
        record["step"]: StepResult(
            record["loss"], record["gradient_norm"], record["learning_rate"], record.get("z_loss")
        )
        for record in folder.metrics()
        if record["event"] == "step"
        and first < record["step"] <= last
        and ("z_loss" in record or not has_z_loss)
    }


def _loss_differences(recorded: Mapping[int, StepResult], results: Mapping[int, StepResult]) -> Iterator[str]:
    for step, result in sorted(recorded.items()):
        if result != results.get(step):
            yield f"step {step:,}: recorded {result}, repeated {results.get(step)}"


def _differences(before: Any, again: Any, path: str) -> Iterator[str]:
    """The places where two nested values differ in at least one bit."""
    if isinstance(before, torch.Tensor) and isinstance(again, torch.Tensor):
        if (
            before.dtype != again.dtype
            or before.shape != again.shape
            or not torch.equal(_bytes(before), _bytes(again.cpu()))
        ):
            yield path
    elif isinstance(before, Mapping) and isinstance(again, Mapping) and before.keys() == again.keys():
        for key in before:
            yield from _differences(before[key], again[key], f"{path} {key}".strip())
    elif isinstance(before, list | tuple) and isinstance(again, list | tuple) and len(before) == len(again):
        for index, (one, two) in enumerate(zip(before, again, strict=True)):
            yield from _differences(one, two, f"{path} {index}".strip())
    elif before != again:
        yield path


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, (N,): comparing values would not show the sign of a zero."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
