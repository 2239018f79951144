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
            help="Delete entries that were not used for this many days; 0 deletes all. Entries in use stay.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show or prune the cache of tokenized text.

    \b
    smolctl cache               # its entries, and when each was last used
    smolctl cache --prune 30    # delete entries not used for 30 days
    """
    from smolctl.data.cached import list_cache, prune_cache
    from smolctl.views.cache import show_cache

    show_cache(output, list_cache() if prune is None else prune_cache(prune))
