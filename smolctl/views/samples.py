"""Completions as they stream, side by side, and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from smolctl.generation.complete import CompletionResult, Timing
from smolctl.generation.load import LoadedModel
from smolctl.views.output import Output


class StreamView:
    """Prints the pieces of one prompt's completions as they come."""

    def __init__(self, out: Output, samples: int) -> None:
        self.out = out
        self.samples = samples
        self.pieces: list[list[str]] = [[] for _ in range(samples)]

    def __call__(self, sample: int, text: str) -> None:
        """Take a piece of text. Several samples are kept apart and printed when they are whole."""
        self.pieces[sample].append(text)
        if self.samples == 1 and not self.out.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """End the line, or print what could not be streamed."""
        if self.out.json:
            return
        if self.samples == 1:
            print(flush=True)
            return
        for number, pieces in enumerate(self.pieces, start=1):
            self.out.show(f"[bold]— {number} of {self.samples} —[/bold]")
            print("".join(pieces))


def timing_line(model: LoadedModel, timing: Timing) -> str:
    """One line of how fast it went."""
    decode = f", decode {timing.decode_tokens_per_s:,.1f} tok/s" if timing.decode_tokens_per_s else ""
    return (
        f"loaded in {model.load_s:.1f} s, prompt of {timing.prompt_tokens} tokens, "
        f"first token after {timing.first_token_s:.2f} s, "
        f"prefill {timing.prefill_tokens_per_s:,.0f} tok/s{decode}"
    )


def show_side_by_side(out: Output, results: Sequence[tuple[LoadedModel, CompletionResult]]) -> None:
    """One column a model: the same prompt, the same seed."""
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True, show_lines=True)
    for model, _ in results:
        table.add_column(Text(model.id), ratio=1, overflow="fold")
    count = len(results[0][1].completions)
    for number in range(count):
        table.add_row(*(Text(result.completions[number].text) for _, result in results))
    table.add_row(*(Text(timing_line(model, result.timing), style="dim") for model, result in results))
    out.show(table)


def to_json(model: LoadedModel, result: CompletionResult) -> Mapping[str, Any]:
    """The JSON document of one model's completions."""
    timing = {"load_s": model.load_s, **asdict(result.timing)}
    return {
        "model": model.id,
        "prompt": result.prompt,
        "completions": [asdict(completion) for completion in result.completions],
        "timing": timing,
    }
