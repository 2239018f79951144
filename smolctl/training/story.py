"""How the answers to the fixed prompts changed: predictions.jsonl as a text to read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from smolctl.training.events import Candidate, Prediction

# Characters that a terminal or a renderer would obey instead of showing them. For ASCII's, Unicode has
# symbols; its own (C1, line and paragraph ends, changes of direction) become the replacement character.
_VISIBLE: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    127: 0x2421,
    **dict.fromkeys(
        (*range(0x80, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)), "\N{REPLACEMENT CHARACTER}"
    ),
}

History = tuple[Prediction, ...]


def histories(records: Iterable[Mapping[str, Any]]) -> dict[str, History]:
    """Every prompt's predictions by rising step, the prompts in the order they first came.

    Args:
        records: of predictions.jsonl. Of two with the same prompt and step the later one counts.
    """
    by_prompt: dict[str, dict[int, Prediction]] = {}
    for record in records:
        prediction = Prediction(
            step=record["step"],
            prompt=record["prompt"],
            text=record["text"],
            loss=record["loss"],
            top=tuple(Candidate(**candidate) for candidate in record["top"]),
        )
        by_prompt.setdefault(prediction.prompt, {})[prediction.step] = prediction
    return {prompt: tuple(steps[step] for step in sorted(steps)) for prompt, steps in by_prompt.items()}


def selection(history: History, most: int) -> History:
    """The first prediction, the last, and some evenly between: at most `most`, which is 2 or more."""
    if len(history) <= most:
        return history
    return tuple(history[round(number * (len(history) - 1) / (most - 1))] for number in range(most))


def to_markdown(by_prompt: Mapping[str, History]) -> str:
    """One section a prompt, one block a step. No text can break out of its block."""
    steps = [prediction.step for history in by_prompt.values() for prediction in history]
    lines = [
        "# Predictions",
        "",
        f"How the model went on from each prompt, from step {min(steps, default=0):,} "
        f"to step {max(steps, default=0):,}. Written anew from predictions.jsonl after every round.",
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


def fenced(text: str) -> list[str]:
    """A text as the lines of a code block whose fence is longer than any run of backticks in it."""
    if not text:
        return ["*(ended at once)*"]
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}text", text.translate(_VISIBLE), fence]


def code_span(text: str) -> str:
    """A text as inline code on one line; line ends, tabs and outer spaces are made visible."""
    text = one_line(text)
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    text = "␣" * before + inner + "␣" * (len(text) - before - len(inner)) if inner else "␣" * len(text)
    if not text:
        return "(nothing)"
    ticks = "`" * (_longest_run(text) + 1)
    gap = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{gap}{text}{gap}{ticks}"


def one_line(text: str) -> str:
    """A text on one line, with line ends, tabs and control characters made visible."""
    return text.replace("\n", "⏎").replace("\t", "⇥").translate(_VISIBLE)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
