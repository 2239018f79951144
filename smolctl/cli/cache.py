"""smolctl cache"""

from __future__ import annotations

from typing import Annotated

import typer

from smolctl.cli.options import command
from smolctl.views.output import Output


@command
def cache(
    output: Output,
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
) -> None:
    """Show how large the cache of tokenized text is, or make it smaller.

    \b
    smolctl cache                                   what it holds, and since when it is unused
    smolctl cache --prune 30                        delete what was not used for 30 days
    """
    from smolctl.data.cached import look_at_cache, prune_cache
    from smolctl.views.cache import show_cache

    show_cache(output, look_at_cache() if prune is None else prune_cache(prune))
