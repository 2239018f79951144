"""Completions as they stream, side by side, token by token, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from smolctl.escaping import one_line
from smolctl.generation.answer import Completion, spell
from smolctl.generation.compare import Divergence
from smolctl.generation.complete import CompletionResult, Timing
from smolctl.generation.load import LoadedModel
from smolctl.views.numbers import counted, percent
from smolctl.views.output import Output
from smolctl.views.tables import headed

if TYPE_CHECKING:
    from rich.text import Text

MARK = "▶"  # before the first difference, for terminals without colour
SURE, UNSURE = 0.5, 0.1  # probabilities of a token, for its colour


class StreamView:
    """Prints the pieces of one prompt's completions as they arrive."""

    def __init__(self, out: Output, samples: int) -> None:
        self.out = out
        self.samples = samples
        self.pieces: list[list[str]] = [[] for _ in range(samples)]

    def __call__(self, sample: int, text: str) -> None:
        """Add a piece of text. Several samples are printed one after the other when all are complete."""
        self.pieces[sample].append(text)
        if self.samples == 1 and not self.out.json:
            self.out.write(text)

    def close(self) -> None:
        """End the line, or print completions that could not be streamed."""
        if self.out.json:
            return
        if self.samples == 1:
            self.out.write("\n")
            return
        texts = ["".join(pieces) for pieces in self.pieces]
        parts = [f"— {number} of {self.samples} —\n{text}\n" for number, text in enumerate(texts, start=1)]
        self.out.write("".join(parts))


def show_facts(out: Output, model: LoadedModel, result: CompletionResult, max_tokens: int) -> None:
    """Show the tokens of an answer if requested, its timing, and whether it was cut."""
    if result.completions[0].alternatives is not None:
        show_explanation(out, model, result)
    if out.json:
        return
    out.message(timing_line(model, result.timing))
    cut = [one for one in result.completions if one.finish_reason == "length"]
    if cut:
        full = all(len(one.tokens) < max_tokens for one in cut)
        place = "where the model's context is full" if full else f"at --max-tokens {max_tokens:,}"
        count = len(result.completions)
        answers = "The answer was" if count == 1 else f"{len(cut):,} of {count:,} answers were"
        out.message(f"{answers} cut {place}, before the model ended {'it' if count == 1 else 'them'}.")


def timing_line(model: LoadedModel, timing: Timing) -> str:
    """One line on the speed."""
    reused = f" ({timing.reused_tokens:,} of them cached)" if timing.reused_tokens else ""
    decode = f", decode {timing.decode_tokens_per_s:,.1f} tok/s" if timing.decode_tokens_per_s else ""
    drafted = (
        f", {timing.accepted_tokens:,} of {timing.guessed_tokens:,} draft tokens accepted in "
        f"{counted(timing.decode_steps, 'step')}"
        if timing.guessed_tokens
        else ""
    )
    rate = timing.prefill_tokens_per_s
    prefill = f", prefill {rate:,.0f} tok/s" if rate else ""  # 0: the whole prompt was cached
    return (
        f"{model.engine.name}: loaded in {model.load_s:.1f} s, prompt of "
        f"{counted(timing.prompt_tokens, 'token')}{reused}, first token after {timing.first_token_s:.2f} s"
        f"{prefill}{decode}{drafted}"
    )


def show_side_by_side(
    out: Output,
    results: Sequence[tuple[LoadedModel, CompletionResult]],
    divergences: Sequence[Sequence[Divergence | None]] | None = None,
) -> None:
    """One column per model, for the same prompt and seed; divergences mark where one differs from the
    first.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True, show_lines=True)
    for model, _ in results:
        table.add_column(Text(model.id), ratio=1, overflow="fold")
    for number in range(len(results[0][1].completions)):
        completions = [result.completions[number] for _, result in results]
        if divergences is None:
            table.add_row(*(Text(completion.text) for completion in completions))
            continue
        places = [of_model[number] for of_model in divergences]
        pairs = list(zip(completions, places, strict=True))
        table.add_row(*(_marked(completion.text, place) for completion, place in pairs))
        words = [_in_words(completion, place) for completion, place in pairs]
        table.add_row(*(Text(text) for text in ["the first model", *words[1:]]))
    table.add_row(*(Text(timing_line(model, result.timing), style="dim") for model, result in results))
    out.show(table)


def _marked(text: str, divergence: Divergence | None) -> Text:
    """A text with a mark where it first differs from the first model's, and in colour from there on."""
    from rich.text import Text

    if divergence is None:
        return Text(text)
    same, other = text[: divergence.character], text[divergence.character :]
    return Text.assemble(same, (MARK, "bold red"), (other, "yellow"))


def _in_words(completion: Completion, divergence: Divergence | None) -> str:
    if divergence is None:
        return f"the same {len(completion.tokens):,} tokens"
    at = (
        f"character {divergence.character:,} (the tokenizers differ)"
        if divergence.token is None
        else f"token {divergence.token:,}"
    )
    expected, found = (
        "the end" if text is None else f"“{visible(text)}”"
        for text in (divergence.expected, divergence.found)
    )
    return f"differs from {at} on: {found} instead of {expected}"


def show_explanation(out: Output, model: LoadedModel, result: CompletionResult) -> None:
    """Every token with its probability and the alternatives."""
    from rich.text import Text

    for number, completion in enumerate(result.completions, start=1):
        heading = "token" if len(result.completions) == 1 else f"token of sample {number}"
        table = headed(("", heading, "probability", "others"), (heading, "others"))
        rows = zip(completion.tokens, completion.logprobs, completion.alternatives or (), strict=True)
        for place, (token, logprob, others) in enumerate(rows):
            listed = "  ".join(f"{visible(other.text)} {percent(other.probability)}" for other in others)
            spelled = visible(spell(model.tokenizer, token))
            probability = math.exp(logprob)
            sure = "green" if probability >= SURE else "red" if probability < UNSURE else "yellow"
            table.add_row(
                str(place), Text(spelled), Text(percent(probability), style=sure), Text(listed, style="dim")
            )
        out.show(table)


def visible(text: str) -> str:
    """A token's text with visible spaces, line breaks and control characters."""
    return one_line(text).replace(" ", "␣")


def to_json(
    model: LoadedModel, result: CompletionResult, divergences: Sequence[Divergence | None] | None = None
) -> dict[str, Any]:
    """The JSON document of one model's completions; with divergences if models are compared."""
    document: dict[str, Any] = {
        "model": model.id,
        "engine": model.engine.name,
        "prompt": result.prompt,
        "completions": [completion_json(completion) for completion in result.completions],
        "timing": {"load_s": model.load_s, **asdict(result.timing)},
    }
    if divergences is not None:
        document["divergence"] = [asdict(place) if place else None for place in divergences]
    return document


def completion_json(completion: Completion) -> dict[str, Any]:
    """One completion; `alternatives` only if requested."""
    values = asdict(completion)
    if completion.alternatives is None:
        del values["alternatives"]
    return values
