"""Output of `serve` when it is ready."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smolctl.views.numbers import counted, size
from smolctl.views.output import Output, fields

if TYPE_CHECKING:
    from smolctl.serving.serve import Ready


def show_ready(output: Output, ready: Ready) -> None:
    """Print one line of JSON, or a few lines for people."""
    for note in ready.notes:
        output.message(note)
    if output.json:
        output.event({"event": "ready", **fields(ready, ("notes",))})
        return
    page = f"Chat in a browser: {ready.page}\n" if ready.page else ""
    output.write(
        f"{ready.model} at {ready.url}/v1 ({ready.engine})\n"
        f"{counted(ready.slots, 'answer')} at once, {ready.context:,} tokens each: "
        f"weights {size(ready.weight_bytes)}, KV cache up to {size(ready.cache_bytes)}.\n"
        f"{page}Stop with Ctrl-C.\n"
    )
