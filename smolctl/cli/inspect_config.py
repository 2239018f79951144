"""smolctl inspect-config"""

from __future__ import annotations

from typing import Annotated

import typer

from smolctl.cli.completion import DTYPES, complete_model, names
from smolctl.cli.options import Model, ModelSettings, command
from smolctl.errors import UsageError
from smolctl.views.output import Output


@command
def inspect_config(
    output: Output,
    model: Model,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="OTHER",
            help="Show only what differs from another MODEL.",
            autocompletion=complete_model,
        ),
    ] = None,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="Print a complete YAML config that `train` accepts.")
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Sequences in memory at once, for the memory table. Default: the recipe's, else 1.",
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length",
            min=1,
            help="Tokens per sequence, for the memory table. Default: the recipe's, else the context, at "
            "most 2,048.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help=f"Precision of the memory table: {', '.join(DTYPES)}. Default: the recipe's, else float32.",
            autocompletion=names(*DTYPES),
        ),
    ] = None,
    settings: ModelSettings = None,
) -> None:
    """Show a config, derived figures and problems.

    \b
    smolctl inspect-config smollm2-135m
    smolctl inspect-config ORG/NAME --batch-size 4 --dtype bfloat16
    smolctl inspect-config FILE.gguf --against runs/latest
    smolctl inspect-config recipe.yaml --yaml > mine.yaml
    """
    from smolctl.inspection import compare, inspect, training_config
    from smolctl.sources import open_source

    source = open_source(model, settings or ())
    if as_yaml and (against or output.json):
        raise UsageError("--yaml writes a config and nothing else", "Leave out --against and --json.")
    if as_yaml:
        from smolctl.config.dump import to_yaml

        print(to_yaml(training_config(source)), end="")
        for problem in source.problems:
            output.message(f"problem: {problem}")
    elif against:
        from smolctl.views.differences import show_differences

        show_differences(output, compare(source, open_source(against)))
    else:
        from smolctl.views.model_report import show_report

        show_report(output, inspect(source, batch_size, sequence_length, dtype))
