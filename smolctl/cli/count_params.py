"""smolctl count-params"""

from __future__ import annotations

from typing import Annotated

import typer

from smolctl.cli.options import Model, ModelSettings, command
from smolctl.views.output import Output


@command
def count_params(
    output: Output,
    model: Model,
    depth: Annotated[
        int,
        typer.Option(
            "--depth", "-d", min=1, help="Depth of the tree: 2 groups identical layers, 4 lists every matrix."
        ),
    ] = 2,
    settings: ModelSettings = None,
) -> None:
    """Count parameters without loading weights.

    \b
    smolctl count-params smollm2-135m
    smolctl count-params FILE.gguf --depth 4
    smolctl count-params smollm2-135m --set num_hidden_layers=12  # fewer layers
    """
    from smolctl.inspection import count_source
    from smolctl.sources import open_source
    from smolctl.views.parameters import show_parameters

    what_if = tuple(settings or ())
    report = count_source(open_source(model, what_if), what_if)
    show_parameters(output, report, depth)
