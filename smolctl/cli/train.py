"""smolctl train"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from smolctl.cli import options
from smolctl.cli.completion import complete_config, complete_weights, names
from smolctl.cli.options import command, run_changes
from smolctl.views.output import Output

DEFAULT_CONFIG = "smollm2-135m"
DEFAULT_FINETUNE_CONFIG = "finetune"


@command
def train(
    output: Output,
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help=f"Preset or YAML. Default: {DEFAULT_CONFIG}; with --init-from: {DEFAULT_FINETUNE_CONFIG}.",
            show_default=False,
            autocompletion=complete_config,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Total optimizer steps; a preset's schedule scales with them."),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Epochs to train, instead of --steps.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            help="Minutes to train, instead of --steps, not counting the time to read the data.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="TEXT",
            help="File, folder, Hub dataset (org/name[@revision][:config]), or 'python', the built-in "
            "corpus; repeatable.",
            autocompletion=names("python"),
        ),
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option("--strict", help="Stop at a row that is not a conversation instead of skipping it."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", help="Hub id, folder, tokenizer.json or .gguf; train:N trains one with N entries."
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            "--init-from",
            metavar="MODEL",
            help="Start from the weights of MODEL; what `quantize` wrote is refused.",
            autocompletion=complete_weights,
        ),
    ] = None,
    batch_size: options.BatchSize = None,
    micro_batch_size: options.MicroBatchSize = None,
    learning_rate: options.LearningRate = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of the initial weights and of dropout.")
    ] = None,
    keep_last: options.KeepLast = None,
    keep_every: options.KeepEvery = None,
    devices: options.Devices = None,
    num_nodes: options.NumNodes = None,
    strategy: options.Strategy = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder. Default: runs/CONFIG-NNN.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in --out.")] = False,
    logger: options.Loggers = None,
    settings: options.Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    accept_guesses: options.AcceptGuesses = False,
) -> int | None:
    """Train a model from a config, or fine-tune one.

    An option that is left out has the value of the config.
    On SIGINT, SIGTERM, SIGHUP or SIGUSR1 a checkpoint is saved and the exit code is 130, 143, 129 or 138.

    \b
    smolctl train nano                   # three to six minutes on two CPU cores
    smolctl train --steps 5000           # smollm2-135m at its full size
    smolctl train --init-from FILE.gguf --data notes.txt --steps 20
    smolctl train chat --init-from FILE.gguf --data conversations.jsonl
    """
    changes = run_changes(locals())
    from smolctl.config import load_run_config
    from smolctl.config.load import merge, parse_settings
    from smolctl.runs.events import Note
    from smolctl.runs.folder import RunFolder
    from smolctl.sources import open_weights
    from smolctl.training.distributed import failing_together, is_main_process
    from smolctl.training.prepare import prepare
    from smolctl.training.train import plan_run
    from smolctl.training.train import train as run_training
    from smolctl.views.training import TrainingView

    name = config or (DEFAULT_FINETUNE_CONFIG if init_from else DEFAULT_CONFIG)
    changes = merge(parse_settings(settings or ()), changes)
    source = open_weights(init_from) if init_from else None
    if source is not None:
        source.require_certainty(accept_guesses)
    run_config = load_run_config(name, flags=changes, model=source.require_config() if source else None)
    out_view = output if is_main_process() else Output(quiet=True)
    with TrainingView(out_view) as view, failing_together():
        if not dry_run and is_main_process():  # before slow work
            RunFolder.require_free(out, force, [init_from] if init_from else [])
        notes: list[str] = []  # of a dry run, which prints one document instead of events
        listen = (lambda event: notes.append(event.text)) if dry_run and output.json else view
        for problem in source.problems if source else ():
            listen(Note(f"{init_from}: {problem}"))
        if Path(name).is_dir():  # a folder is not a config, so a preset of that name was used
            listen(Note(f"{name} is the preset; the folder {Path(name).absolute()} is not used."))
        prepared = prepare(run_config, source, listen, view.tokenizing, changes)
        if dry_run:
            plan = plan_run(prepared, out or Path("runs"))
            out_view.document({"plan": asdict(plan), "notes": notes})
            view.show_plan(plan)
            return None
        result = run_training(prepared, Path(name).stem, out, force, view)
    return result.exit_code
