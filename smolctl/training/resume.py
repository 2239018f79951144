"""`resume`: go on from a checkpoint, in the same folder or as a branch, exactly or with named changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolctl.config import RunConfig, resolve_run_config
from smolctl.config.load import merge
from smolctl.data.tokenizer.tokenizer import load_tokenizer
from smolctl.data.tokens.corpus import TokenizeProgress
from smolctl.durable import file_digest, naming_the_disk
from smolctl.errors import InputError, UsageError
from smolctl.runs.events import Listener, Note
from smolctl.runs.folder import CheckpointFile, RunFolder
from smolctl.runs.records import RunRecorder, claim_run_folder
from smolctl.training.checkpoint import (
    CHECKSUM_SUFFIX,
    find_damage,
    read_checkpoint,
    set_aside,
)
from smolctl.training.distributed import is_main_process
from smolctl.training.fit import RunResult, fit
from smolctl.training.optim.schedule import LearningRatePolicy, continue_schedule, learning_rate
from smolctl.training.prepare import Prepared, prepare_again, with_compile_decided
from smolctl.training.train import plan_run

LINEAGE = "lineage.json"

# A run cannot change these and be the same run. What the optimizer keeps belongs to one optimizer.
FIXED_SECTIONS = ("model", "tokenizer", "data")
FREE_KEYS = ("model.attention_dropout", "data.workers")
FIXED_KEYS = ("optimizer.name", "train.seed")


@dataclass(frozen=True)
class ResumeOptions:
    """What a user may ask of a resumed run beyond its target."""

    step: int | None = None  # of the checkpoint to go on from; None takes the newest
    extra: int | None = None  # steps beyond it
    until: int | None = None  # or the step of the whole run to end at
    settings: Mapping[str, Any] = field(default_factory=dict)  # nested config values to change
    policy: LearningRatePolicy = "hold"
    out: Path | None = None  # a new folder to branch into
    force: bool = False  # let newer checkpoints go


def resume(
    run: Path,
    options: ResumeOptions,
    emit: Listener,
    on_tokenize: Callable[[TokenizeProgress], None] | None = None,
) -> RunResult:
    """Continue a run exactly where a checkpoint left it.

    Args:
        run: its folder.
        options: target, changes, and where to go on.
        emit: hears every event.
        on_tokenize: hears how far the tokenization is, should the cached tokens be gone.

    Raises:
        UsageError: nothing would be left to do, or newer checkpoints would be replaced.
        InputError: the checkpoint is damaged, or the data, the tokenizer or the shape would be another one.
    """
    parent = RunFolder.open(run)
    recorder = RunRecorder(parent.path)
    if not is_main_process():
        prepared, checkpoint = _prepare(parent, options, lambda _event: None, None)
        return fit(prepared, recorder, None, checkpoint.path, emit)
    if options.out is not None:
        prepared, checkpoint = _prepare(parent, options, emit, on_tokenize)
        with naming_the_disk(options.out):
            recorder = RunRecorder(claim_run_folder(options.out.name, options.out, options.force))
        with recorder.lock():
            with naming_the_disk(options.out):
                _branch(parent, checkpoint, recorder, prepared)
            return _go_on(prepared, recorder, checkpoint, emit)
    with recorder.lock():
        prepared, checkpoint = _prepare(parent, options, emit, on_tokenize)
        with naming_the_disk(parent.path):
            _clear_newer(parent, checkpoint, options.force)
            recorder.forget_after(checkpoint.step)
            recorder.write_config(prepared.config)
        return _go_on(prepared, recorder, checkpoint, emit)


def _go_on(
    prepared: Prepared, recorder: RunRecorder, checkpoint: CheckpointFile, emit: Listener
) -> RunResult:
    plan = plan_run(prepared, recorder.folder)
    return fit(prepared, recorder, plan, checkpoint.path, emit)


def _prepare(
    parent: RunFolder,
    options: ResumeOptions,
    emit: Listener,
    on_tokenize: Callable[[TokenizeProgress], None] | None,
) -> tuple[Prepared, CheckpointFile]:
    """Everything that can be refused, before anything is touched."""
    checkpoint = sound_checkpoint(parent, options.step)
    content = read_checkpoint(checkpoint.path)
    before = RunConfig.model_validate(content["hyper_parameters"]["config"])
    config = with_compile_decided(changed_config(before, checkpoint.step, options), emit)
    state = content["smolctl"]
    del content  # Lightning reads the file again; two copies need not be in memory
    prepared = prepare_again(
        config, load_tokenizer(str(parent.path / "tokenizer")), checkpoint.step, state, on_tokenize
    )
    require_same_data(state, prepared, checkpoint)
    for line in changes(before, config):
        emit(Note(f"Changed: {line}"))
    emit(Note(learning_rate_at_boundary(before, config, checkpoint.step)))
    return prepared, checkpoint


def sound_checkpoint(folder: RunFolder, step: int | None) -> CheckpointFile:
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


def changed_config(before: RunConfig, done: int, options: ResumeOptions) -> RunConfig:
    """The config of the steps to come.

    Raises:
        UsageError: both or senseless targets were given, or no step would be left to do.
        InputError: a setting was changed that makes it another run.
    """
    if options.extra is not None and options.until is not None:
        raise UsageError("--extra and --until exclude each other", "Give one of them.")
    target = done + options.extra if options.extra is not None else options.until or before.train.steps
    if target <= done:
        raise UsageError(
            f"the run is at step {done} already and would end at {target}: nothing to do",
            "Say how much more with --extra N.",
        )
    values = merge(before.model_dump(), options.settings)
    config = resolve_run_config(merge(values, {"train": {"steps": target}}), "resume").with_whole_steps()
    fixed = [line for line in changes(before, config) if _is_fixed(line.split(" ")[0])]
    if fixed:
        raise InputError(
            f"a resumed run cannot change {fixed[0]}",
            "Start a new run from its weights instead: smolctl train --init-from RUN.",
        )
    schedule = continue_schedule(
        config.schedule, before.optimizer.learning_rate, done, target, options.policy
    )
    return config.model_copy(update={"schedule": schedule})


def _is_fixed(key: str) -> bool:
    return key in FIXED_KEYS or (key.split(".")[0] in FIXED_SECTIONS and key not in FREE_KEYS)


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """Every setting that differs, as "section.key old → new"; the number of steps is no such change."""
    old, new = _flat(before), _flat(after)
    return [f"{key} {old[key]} → {new[key]}" for key in old if old[key] != new[key] and key != "train.steps"]


def _flat(config: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, section in config.model_dump().items():
        inner = section if isinstance(section, dict) else {"": section}
        flat |= {f"{name}.{key}".rstrip("."): value for key, value in inner.items()}
    return flat


def learning_rate_at_boundary(before: RunConfig, after: RunConfig, done: int) -> str:
    """What the learning rate does where the run goes on, and at its end, in one sentence."""
    last = learning_rate(done, before.optimizer.learning_rate, before.schedule)
    steps = (done + 1, after.train.steps)
    first, end = (learning_rate(step, after.optimizer.learning_rate, after.schedule) for step in steps)
    planned = (after.schedule.decay_start or 0) + int(after.schedule.decay_steps)
    past = f" (the schedule ends at step {planned:,})" if done < planned < after.train.steps else ""
    warning = ""
    if first == end == 0:
        warning = " Nothing will be learned: the schedule has come to its end, at 0; see --lr-policy."
    return (
        f"Learning rate: {last:.3g} at step {done:,}, {first:.3g} at step {steps[0]:,}, "
        f"{end:.3g} at step {steps[1]:,}{past}.{warning}"
    )


def require_same_data(state: Mapping[str, Any], prepared: Prepared, checkpoint: CheckpointFile) -> None:
    """Compare the fingerprints in a checkpoint with the tokenizer and the corpus at hand.

    Raises:
        InputError: one of them is another one.
    """
    if state["tokenizer"] != prepared.fingerprints["tokenizer"]:
        raise InputError(
            f"{checkpoint.path}: the run's tokenizer folder holds another tokenizer than it was trained with",
            "Put the tokenizer back, or start anew from these weights: smolctl train --init-from RUN.",
        )
    if state["data"] != prepared.fingerprints["data"]:
        raise InputError(
            f"{checkpoint.path}: the corpus is not the one that the run was trained on",
            "Put the files back, or start anew from these weights: smolctl train --init-from RUN --data …",
        )


def _clear_newer(folder: RunFolder, checkpoint: CheckpointFile, force: bool) -> None:
    """Make room for the steps to come: damaged files are set aside, good ones only by force.

    Raises:
        UsageError: a newer good checkpoint would be replaced.
    """
    newer = [file for file in folder.checkpoints() if file.step > checkpoint.step]
    good = [file for file in newer if not find_damage(file.path)]
    if good and not force:
        raise UsageError(
            f"{folder.path} has newer checkpoints (up to step {good[-1].step:,}) "
            f"that going on from step {checkpoint.step:,} would replace",
            "Branch into a folder of its own with --out NEW, or replace them with --force.",
        )
    for file in newer:
        if file in good:
            file.path.unlink()
            Path(f"{file.path}{CHECKSUM_SUFFIX}").unlink(missing_ok=True)
        else:
            set_aside(file.path)


def _branch(parent: RunFolder, checkpoint: CheckpointFile, recorder: RunRecorder, prepared: Prepared) -> None:
    """A new run that begins with a copy of the parent's checkpoint and of its records up to there."""
    recorder.describe(prepared.config, prepared.tokenizer.save)
    copy = recorder.folder / "checkpoints" / checkpoint.path.name
    shutil.copyfile(checkpoint.path, copy)
    checksum = Path(f"{checkpoint.path}{CHECKSUM_SUFFIX}")
    if checksum.is_file():
        shutil.copyfile(checksum, f"{copy}{CHECKSUM_SUFFIX}")
    recorder.copy_records(parent.path, checkpoint.step)
    lineage = {
        "parent": str(parent.path),
        "step": checkpoint.step,
        "checkpoint_sha256": file_digest(checkpoint.path),
        "parent_lineage": _lineage_of(parent),
    }
    (recorder.folder / LINEAGE).write_text(json.dumps(lineage, indent=2) + "\n", encoding="utf-8")


def _lineage_of(run: RunFolder) -> dict[str, Any] | None:
    path = run.path / LINEAGE
    content: dict[str, Any] | None = json.loads(path.read_text("utf-8")) if path.is_file() else None
    return content
