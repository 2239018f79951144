"""Which checkpoints a run keeps, and which are deleted for later ones."""

from __future__ import annotations

from smolctl.config.run import CheckpointConfig
from smolctl.errors import UsageError
from smolctl.runs.checkpoint_file import is_recorded_alike, remove_checkpoint, set_aside
from smolctl.runs.folder import RunFolder
from smolctl.runs.layout import CHECKPOINTS, FINAL


def remove_old_checkpoints(run: RunFolder, kept: CheckpointConfig) -> None:
    """Delete the checkpoints that a run does not keep."""
    files = run.checkpoints()
    old = files[: -kept.keep_last] if kept.keep_last else ()
    if not old:
        return
    best = run.best_validation({file.step for file in files}) if kept.keep_best else None
    for file in old:
        is_due = kept.keep_every and file.step and file.step % kept.keep_every == 0
        if not is_due and not (best and file.step == best["step"]):
            remove_checkpoint(file.path)


def clear_after(run: RunFolder, step: int, force: bool) -> None:
    """Prepare for repeating the steps after `step`: damaged files are set aside, intact ones are deleted only
    with force.

    The name final.ckpt is removed too, because its checkpoint keeps its step's name. A final.ckpt that may be
    the only intact copy of one is set aside.

    Raises:
        UsageError: a newer intact checkpoint would be replaced.
    """
    newer = {file: not file.damage for file in run.checkpoints() if file.step > step}
    sound = [file for file, is_sound in newer.items() if is_sound]
    if sound and not force:
        raise UsageError(
            f"{run.path} has newer checkpoints (up to step {sound[-1].step:,}) "
            f"that continuing from step {step:,} would replace",
            "Branch into a folder of its own with --out NEW, or replace them with --force.",
        )
    final = run.path / CHECKPOINTS / FINAL
    files = [file for file in run.checkpoints() if file.path != final]
    if final.exists():  # in a copied folder it is a separate file
        alike = [file for file in files if is_recorded_alike(final, file.path)]
        is_kept = any(final.samefile(file.path) or not file.damage for file in alike)
        (remove_checkpoint if is_kept else set_aside)(final)
    for file in newer.keys() & set(files):
        (remove_checkpoint if file in sound else set_aside)(file.path)
