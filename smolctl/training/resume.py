"""`resume`: continue from a checkpoint, in the same folder or as a branch, exactly or with listed changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smolctl.config import RunConfig, resolve_run_config
from smolctl.config.load import changed_run, merge, nested, with_scaled_floor
from smolctl.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from smolctl.data.tokens.corpus import TokenizeProgress
from smolctl.durable import explaining_disk_errors
from smolctl.errors import InputError, UsageError
from smolctl.runs.checkpoint_file import CheckpointFile, holds_weights, read_checkpoint
from smolctl.runs.events import Listener, Note, Start
from smolctl.runs.folder import RunFolder
from smolctl.runs.layout import CONFIG, step_in_name
from smolctl.runs.retention import clear_after
from smolctl.runs.root import RUNS, make_latest
from smolctl.sources.checkpoint import tokenizer_inside
from smolctl.training.device import Decisions, decide_again, describe_environment
from smolctl.training.distributed import is_main_process, with_process_counts
from smolctl.training.fit import RunResult, fit
from smolctl.training.optim.schedule import (
    LearningRatePolicy,
    continue_schedule,
    learning_rate,
    require_sense,
)
from smolctl.training.prepare import Prepared, prepare_again, with_pinned_sources
from smolctl.training.state import run_of
from smolctl.training.tolerance import LATEST_LINK, Tolerance
from smolctl.training.train import plan_run

# A run that changes these is a different run. An optimizer's state fits only that optimizer.
FIXED_SECTIONS = ("model", "tokenizer", "data", "init_from")
# Sources may have moved; `require_same_data` compares their content.
FREE_KEYS = ("model.attention_dropout", "data.workers", "data.source", "data.validation")
LENGTHS = ("train.epochs", "train.minutes")  # a new run converts these to its number of steps
FIXED_KEYS = (
    *("optimizer.name", "optimizer.decay_embeddings", "optimizer.embedding_lr_multiplier"),
    *("train.seed", "schedule.pace", *LENGTHS),
)


@dataclass(frozen=True)
class ResumeOptions:
    """Options of a resumed run besides its target."""

    step: int | None = None  # of the checkpoint to continue from; None: the newest
    extra: int | None = None  # steps after that checkpoint
    until: int | None = None  # or the total number of steps
    settings: Mapping[str, Any] = field(default_factory=dict)  # nested config values to change
    policy: LearningRatePolicy = "hold"
    out: Path | None = None  # a new folder to branch into
    force: bool = False  # allow newer checkpoints to be replaced


def resume(
    reference: Path,
    options: ResumeOptions,
    emit: Listener,
    on_tokenize: Callable[[TokenizeProgress], None] | None = None,
) -> RunResult:
    """Continue a run exactly where a checkpoint left it.

    Args:
        reference: its folder, or a checkpoint file. A file outside of a run becomes a new run.
        options: target, changes, and the folder.
        emit: gets every event.
        on_tokenize: gets the progress of tokenization if the cached tokens are missing.

    Raises:
        UsageError: no step is left, or newer checkpoints would be replaced.
        InputError: the checkpoint is damaged, or the data, the tokenizer or the shape differs.
    """
    parent, step = find_run(reference, options.step)
    if not is_main_process():
        prepared, checkpoint = _prepare(parent, reference, step, options, lambda _event: None, None)
        return fit(prepared, parent or RunFolder(options.out or RUNS), checkpoint.path, emit)
    if parent is None or options.out is not None:
        reads: tuple[str, ...] = (str(reference),)
        RunFolder.require_free(options.out, options.force, reads)  # before anything that takes long
        prepared, checkpoint = _prepare(parent, reference, step, options, emit, on_tokenize)
        with explaining_disk_errors(options.out or RUNS):
            reads += prepared.config.data.texts
            run = RunFolder.claim(reference.stem, options.out, options.force, reads, emit)
        with run.lock(emit):
            with explaining_disk_errors(run.path):
                environment = describe_environment(prepared.config, prepared.decisions, prepared.corpus.read)
                run.describe(prepared.config, environment, prepared.tokenizer.save)
                run.branch_from(checkpoint.path, checkpoint.step, parent)
            with Tolerance(emit)(LATEST_LINK, checkpoint.step):
                make_latest(run.path)
            return _continue(prepared, run, checkpoint, emit)
    with parent.lock(emit):
        prepared, checkpoint = _prepare(parent, reference, step, options, emit, on_tokenize)
        with explaining_disk_errors(parent.path):
            checkpoint = parent.under_its_step(checkpoint)
            clear_after(parent, checkpoint.step, options.force)
            parent.keep_records(checkpoint.step)
            parent.write_config(prepared.config)
            parent.update_environment(
                describe_environment(prepared.config, prepared.decisions, prepared.corpus.read)
            )
        return _continue(prepared, parent, checkpoint, emit)


def find_run(reference: Path, step: int | None) -> tuple[RunFolder | None, int | None]:
    """The run of a folder or checkpoint file, and the step; no run for a file outside of one."""
    if not reference.is_file():
        return RunFolder.open(reference), step
    run = RunFolder.around(reference)
    return run, step_in_name(reference) if run else None


def _continue(prepared: Prepared, run: RunFolder, checkpoint: CheckpointFile, emit: Listener) -> RunResult:
    plan = plan_run(prepared, run.path)
    emit(Start(str(run.path), prepared.first_step, prepared.config.train.steps, plan))
    return fit(prepared, run, checkpoint.path, emit)


def _prepare(
    parent: RunFolder | None,
    reference: Path,
    step: int | None,
    options: ResumeOptions,
    emit: Listener,
    on_tokenize: Callable[[TokenizeProgress], None] | None,
) -> tuple[Prepared, CheckpointFile]:
    """All checks, before anything is changed."""
    path = parent.checkpoint(step).path if parent else reference
    content = read_checkpoint(path)
    before, state = run_of(content, path)
    checkpoint = CheckpointFile(content["global_step"], path)
    if parent is not None and (edits := edited_settings(parent, before)):
        emit(Note(f"{parent.path / CONFIG} was edited: {', '.join(edits)}."))
        options = replace(options, settings=merge(nested(edits), options.settings))
    changed = changed_config(before, checkpoint.step, options)
    if changed.data.texts != before.data.texts:
        changed = with_pinned_sources(changed)
    config, decisions = decide_again(changed, decisions_of(state), options.settings, emit)
    config = with_process_counts(config)
    tokenizer, has_weights = tokenizer_of(content, parent, path), holds_weights(content)
    del content  # Lightning reads the file again, so this copy is not needed in memory
    prepared = prepare_again(
        config, tokenizer, decisions, checkpoint.step, state, emit, on_tokenize, has_weights
    )
    require_same_data(state, prepared, checkpoint)
    for line in changes(before, config):
        if line.startswith("schedule.pace "):
            continue  # too long to print, and determined by the other settings
        emit(Note(f"Changed: {line}"))
    emit(Note(learning_rate_at_boundary(before, config, checkpoint.step)))
    return prepared, checkpoint


def edited_settings(run: RunFolder, before: RunConfig) -> dict[str, Any]:
    """Settings that were edited in a run's config.yaml, under the dotted names of `--set`."""
    edited = run.edited_config()
    if edited is None:
        return {}
    old, new = before.settings(), edited.settings()
    return {key: value for key, value in new.items() if value != old.get(key)}


def decisions_of(state: Mapping[str, Any]) -> Decisions:
    """The settings chosen for the device on which a checkpoint was written."""
    kept = state.get("decisions") or {"device": "", "asked": ()}
    return Decisions(kept["device"], tuple(kept["asked"]))


def tokenizer_of(content: Mapping[str, Any], parent: RunFolder | None, path: Path) -> Tokenizer:
    """The tokenizer of a run's folder, or the one in the checkpoint itself.

    Raises:
        InputError: neither exists.
    """
    if parent is not None and parent.tokenizer.is_dir():
        return load_tokenizer(str(parent.tokenizer))
    read = tokenizer_inside(content, path)
    if read is None:
        raise InputError(f"{path}: contains no tokenizer", "Put the file back into its run folder.")
    return Tokenizer.from_files(read(), str(path))


def changed_config(before: RunConfig, done: int, options: ResumeOptions) -> RunConfig:
    """The config of the next steps.

    Raises:
        UsageError: both targets or an invalid one were given, or no step is left.
        InputError: a changed setting would make it a different run.
    """
    values = changed_run(with_scaled_floor(before.model_dump(), options.settings), options.settings)
    asked = resolve_run_config(values, "resume")
    fixed = [line for line in changes(before, asked) if _is_fixed(line.split(" ")[0])]
    if fixed:
        is_length = fixed[0].startswith(LENGTHS)
        raise InputError(
            f"a resumed run cannot change {fixed[0]}",
            "Say how far it goes with --extra or --until."
            if is_length
            else "Change it back, or start a new run from its weights: smolctl train --init-from RUN.",
        )
    steps = asked.train.steps
    changed_steps = steps if steps != before.train.steps else None
    targets = {"--extra": options.extra, "--until": options.until, "train.steps": changed_steps}
    given = [name for name, value in targets.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} cannot be combined", "Give one of them.")
    target = done + options.extra if options.extra else options.until or steps
    if target <= done:
        raise UsageError(
            f"the run is at step {done} already and would end at {target}: nothing to do",
            "Use --extra N to train further.",
        )
    config = resolve_run_config(merge(values, {"train": {"steps": target}}), "resume").with_whole_steps()
    if {"schedule", "optimizer"} & options.settings.keys():
        require_sense(config)
    schedule = continue_schedule(
        config.schedule, before.optimizer.learning_rate, done, target, options.policy
    )
    return config.model_copy(update={"schedule": schedule})


def _is_fixed(key: str) -> bool:
    return key in FIXED_KEYS or (key.split(".")[0] in FIXED_SECTIONS and key not in FREE_KEYS)


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """Every setting that differs, as "section.key old → new", except the number of steps."""
    old, new = before.settings(), after.settings()
    pairs = {key: (old.get(key), new.get(key)) for key in (*old, *new)}
    return [f"{key} {a} → {b}" for key, (a, b) in pairs.items() if a != b and key != "train.steps"]


def learning_rate_at_boundary(before: RunConfig, after: RunConfig, done: int) -> str:
    """A sentence on the learning rate where the run continues, and at its end."""
    last = learning_rate(done, before.optimizer.learning_rate, before.schedule)
    steps = (done + 1, after.train.steps)
    first, end = (learning_rate(step, after.optimizer.learning_rate, after.schedule) for step in steps)
    planned = after.schedule.step_at((after.schedule.decay_start or 0) + int(after.schedule.decay_steps))
    past = f" (the schedule ends at step {planned:,})" if done < planned < after.train.steps else ""
    warning = ""
    if first == end == 0:
        warning = (
            " The schedule has ended at a learning rate of 0, so nothing would be learned; see --lr-policy."
        )
    rates = {done: last, steps[0]: first, steps[1]: end}
    shown = ", ".join(f"{rate:.3g} at step {step:,}" for step, rate in rates.items())
    return f"Learning rate: {shown}{past}.{warning}"


def require_same_data(state: Mapping[str, Any], prepared: Prepared, checkpoint: CheckpointFile) -> None:
    """Compare the fingerprints in a checkpoint with the current tokenizer and corpus.

    Raises:
        InputError: one of them differs.
    """
    if state["tokenizer"] != prepared.fingerprints["tokenizer"]:
        raise InputError(
            f"{checkpoint.path}: the run's tokenizer folder holds another tokenizer than it was trained with",
            "Put the tokenizer back, or start a new run from these weights: smolctl train --init-from RUN.",
        )
    if state["data"] != prepared.fingerprints["data"]:
        raise InputError(
            f"{checkpoint.path}: the corpus is not the one that the run was trained on",
            "Put the files back, or start a new run: smolctl train --init-from RUN --data …",
        )
