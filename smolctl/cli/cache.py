"""smolctl cache"""

from __future__ import annotations

from typing import Annotated

import typer

from smolctl.cli.options import Debug, Json, Quiet, Verbose, command
from smolctl.views.output import Output


@command
def cache(
    prune: Annotated[
        float | None,
        typer.Option(
            "--prune",
            metavar="DAYS",
            min=0,
            help="Delete what was not used for so many days; 0: everything. Not while a run needs it.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Show how large the cache of tokenized text is, or make it smaller.

    \b
    smolctl cache                                   what it holds, and since when it is unused
    smolctl cache --prune 30                        delete what was not used for 30 days
    """
    from smolctl.data.cached import look_at_cache, prune_cache
    from smolctl.views.cache import show_cache

    show_cache(Output(json, quiet, verbose), look_at_cache() if prune is None else prune_cache(prune))
