"""smolctl resume"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from smolctl.cli import options
from smolctl.cli.completion import complete_run
from smolctl.cli.options import command, run_changes
from smolctl.errors import ExitCode
from smolctl.views.output import Output


@command
def resume(
    output: Output,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="runs/NAME, runs/NAME@STEP, runs/NAME@best or a .ckpt file. Default: the newest run.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ] = None,
    extra: Annotated[
        int | None,
        typer.Option("--extra", min=1, help="Steps to train after the checkpoint.", show_default=False),
    ] = None,
    until: Annotated[
        int | None,
        typer.Option(
            "--until", min=1, help="Last step, counted from the start of the run.", show_default=False
        ),
    ] = None,
    lr_policy: Annotated[
        Literal["hold", "extend", "rewarm"],
        typer.Option(
            "--lr-policy",
            help="Learning rate after the resume. hold: keep the schedule, constant after its end; "
            "extend: move its end to the new last step; rewarm: another warmup and decay.",
        ),
    ] = "hold",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Repeat the steps before the newest checkpoint and compare the result bit for bit.",
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Continue in a new folder; the original run does not change.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace newer checkpoints, or the run in --out.")
    ] = False,
    batch_size: options.BatchSize = None,
    micro_batch_size: options.MicroBatchSize = None,
    learning_rate: options.LearningRate = None,
    keep_last: options.KeepLast = None,
    keep_every: options.KeepEvery = None,
    devices: options.Devices = None,
    num_nodes: options.NumNodes = None,
    strategy: options.Strategy = None,
    settings: options.Settings = None,
    logger: options.Loggers = None,
) -> int:
    """Continue a run exactly where it stopped.

    An option that is left out has the value of the run.
    On SIGINT, SIGTERM, SIGHUP or SIGUSR1 a checkpoint is saved and the exit code is 130, 143, 129 or 138.

    \b
    smolctl resume                                 # finish what was planned
    smolctl resume --extra 50                      # 50 more steps
    smolctl resume runs/nano-001@300 --out runs/b  # branch from an older step
    smolctl resume --verify                        # prove that resuming is exact
    """
    changes = run_changes(locals())
    from smolctl.config.load import merge, parse_settings
    from smolctl.runs.reference import split_step
    from smolctl.runs.root import latest_run
    from smolctl.training.distributed import failing_together, is_main_process
    from smolctl.training.resume import ResumeOptions
    from smolctl.training.resume import resume as resume_run
    from smolctl.training.verify import verify as verify_run
    from smolctl.views.training import TrainingView

    path, step = split_step(run) if run else (latest_run(), None)
    changes = merge(parse_settings(settings or ()), changes)
    asked = ResumeOptions(step, extra, until, changes, lr_policy, out, force)
    out_view = output if is_main_process() else Output(quiet=True)
    with TrainingView(out_view) as view, failing_together():
        if verify:
            verification = verify_run(path, asked, view, view.tokenizing)
            if not is_main_process():
                return ExitCode.DONE  # the main process reports the result
            view.show_verification(verification)
            return verification.exit_code
        return resume_run(path, asked, view, view.tokenizing).exit_code
