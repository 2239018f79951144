"""A run as a command line names it: RUN, RUN@STEP or RUN@best."""

from __future__ import annotations

from pathlib import Path

from smolctl.errors import InputError
from smolctl.runs.folder import RunFolder

BEST = "best"  # in place of a step: that of the checkpoint that predicts the held-out text best


def split_step(reference: str) -> tuple[Path, int | None]:
    """`runs/NAME@STEP` or `runs/NAME@best` as the run and the step; without either the step is None.

    Raises:
        InputError: what follows the last `@` is not a step, or no checkpoint of the run was validated.
    """
    run, at, step = reference.rpartition("@")
    if not at or Path(reference).exists():
        return Path(reference), None
    if step == BEST:
        return Path(run), RunFolder.open(Path(run)).best_step()
    if not (step.isascii() and step.isdecimal()):
        raise InputError(
            f"{reference}: {step or 'nothing'} is not a step",
            "Write RUN@STEP, such as runs/nano@500, or RUN@best.",
        )
    return Path(run), int(step)
