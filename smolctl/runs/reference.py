"""A run on the command line: RUN, RUN@STEP or RUN@best."""

from __future__ import annotations

from pathlib import Path

from smolctl.errors import InputError
from smolctl.runs.folder import RunFolder

BEST = "best"  # instead of a step: the checkpoint with the best score on the held-out text


def split_step(reference: str) -> tuple[Path, int | None]:
    """Split `runs/NAME@STEP` or `runs/NAME@best` into the run and the step; the step is None if there is
    none.

    Raises:
        InputError: the text after the last `@` is not a step, or no checkpoint of the run was validated.
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
