"""smolctl resume"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smolctl.cli.options import Debug, Json, Loggers, Quiet, Verbose, command, logger_names
from smolctl.views.output import Output


@command
def resume(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="runs/NAME or runs/NAME@STEP. Default: the newest run.", show_default=False
        ),
    ] = None,
    extra: Annotated[
        int | None, typer.Option("--extra", min=1, help="Steps beyond the checkpoint.", show_default=False)
    ] = None,
    until: Annotated[
        int | None,
        typer.Option("--until", min=1, help="Step of the whole run to end at.", show_default=False),
    ] = None,
    logger: Loggers = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> int:
    """Continue a run exactly where it stopped.

    \b
    smolctl resume                                  finish what was planned
    smolctl resume --extra 50                       50 steps more than the newest checkpoint
    smolctl resume runs/nano-001@400 --until 900    go on from an older checkpoint
    """
    from smolctl.sources.run_folder import latest_run, split_step
    from smolctl.training.run import resume as resume_run
    from smolctl.views.training import TrainingView

    path, step = split_step(run) if run else (latest_run(), None)
    with TrainingView(Output(json, quiet, verbose)) as view:
        result = resume_run(
            Path(path), step, extra, until, view, view.tokenizing, loggers=logger_names(logger)
        )
    return result.exit_code
