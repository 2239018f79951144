"""predictions.jsonl as a text: how the continuations of the fixed prompts changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from smolctl.escaping import code_span, fenced
from smolctl.runs.events import Prediction

T = TypeVar("T")
History = tuple[Prediction, ...]


def histories(predictions: Iterable[Prediction]) -> dict[str, History]:
    """Every prompt's predictions in order of steps; prompts in order of their first occurrence.

    Args:
        predictions: of predictions.jsonl. A later one replaces an earlier one with the same prompt and step.
    """
    by_prompt: dict[str, dict[int, Prediction]] = {}
    for prediction in predictions:
        by_prompt.setdefault(prediction.prompt, {})[prediction.step] = prediction
    return {prompt: tuple(steps[step] for step in sorted(steps)) for prompt, steps in by_prompt.items()}


def selection(items: Sequence[T], most: int) -> tuple[T, ...]:
    """The first of some items, the last, and evenly spaced ones between: at most `most`, which is at least
    2.
    """
    if len(items) <= most:
        return tuple(items)
    return tuple(items[round(number * (len(items) - 1) / (most - 1))] for number in range(most))


def to_markdown(by_prompt: Mapping[str, History]) -> str:
    """One section per prompt, one block per step. No text can end its block."""
    steps = [prediction.step for history in by_prompt.values() for prediction in history]
    lines = [
        "# Predictions",
        "",
        f"How the model continued each prompt, from step {min(steps, default=0):,} "
        f"to step {max(steps, default=0):,}. Rewritten from predictions.jsonl after every round.",
    ]
    for prompt, history in by_prompt.items():
        lines += ["", f"## {code_span(prompt)}"]
        for prediction in history:
            lines += ["", *_block(prediction)]
    return "\n".join(lines) + "\n"


def _block(prediction: Prediction) -> list[str]:
    facts = [f"**Step {prediction.step:,}**"]
    if prediction.loss is not None:
        facts.append(f"loss on the prompt {prediction.loss:.3f}")
    likely = ", ".join(
        f"{code_span(candidate.text)} {candidate.probability:.1%}" for candidate in prediction.top
    )
    facts.append(f"next: {likely}")
    return [" · ".join(facts), "", *fenced(prediction.text)]
