"""The live display of a run: its state as lines that fill the screen."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smolctl.escaping import one_line
from smolctl.runs.events import Checkpoint, Event, Note, Prediction, Start, Step, Validation
from smolctl.runs.folder import RunFolder
from smolctl.runs.prediction_history import History
from smolctl.timing import with_error
from smolctl.views.chart import LEAST_LINES, LEAST_WIDTH, loss_chart
from smolctl.views.numbers import duration, quantity, size

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

LABEL_WIDTH, FACT_WIDTH = 10, 40  # columns of a fact's name, and of a fact
AIRY = 30  # minimum screen lines for blank lines between its parts
SHORTEST_BAR = 10
WAITING = "waiting for the first steps; Ctrl-C at any time saves the run and ends it"
LEAST_PREDICTIONS = 3  # minimum lines of predictions, if there are as many, before the chart gets any


@dataclass
class RunState:
    """The state of a run, updated by its events."""

    run: str = ""
    first: int = 0  # finished steps when the session started
    until: int = 0
    corpus_tokens: int = 0
    is_chat: bool = False  # trained on conversations
    curve: array[float] = field(default_factory=lambda: array("d"))  # step, loss, step, loss, …
    held_out: array[float] = field(default_factory=lambda: array("d"))  # alternating like `curve`
    predictions: dict[str, History] = field(default_factory=dict)
    step: Step | None = None
    validation: Validation | None = None
    checkpoint: Checkpoint | None = None
    note: str = ""  # the latest one
    at: dict[str, float] = field(default_factory=dict)  # time.monotonic() of the latest event of each kind

    def __call__(self, event: Event) -> None:
        """Update the state with an event."""
        self.at[event.event] = time.monotonic()
        if isinstance(event, Start):
            self._start(event)
        elif isinstance(event, Step):
            self.step = event
            self.until = event.until or self.until
            if event.loss is not None:
                self.curve.extend((event.step, event.loss))
        elif isinstance(event, Prediction):
            self.predictions[event.prompt] = (*self.predictions.get(event.prompt, ()), event)
        elif isinstance(event, Validation):
            self.validation = event
            self.held_out.extend((event.step, event.loss))
        elif isinstance(event, Checkpoint):
            self.checkpoint = event
        elif isinstance(event, Note):
            self.note = event.text

    def _start(self, event: Start) -> None:
        """Start with the records of earlier sessions."""
        self.run, self.first, self.until, self.note = event.run, event.step, event.until, ""
        self.corpus_tokens, self.is_chat = event.plan.corpus_tokens, event.plan.conversations is not None
        folder = RunFolder(Path(event.run))
        self.predictions = folder.predictions()
        for record in folder.metrics():
            if record["loss"] is not None:
                points = self.curve if record["event"] == Step.event else self.held_out
                points.extend((record["step"], record["loss"]))


@dataclass(frozen=True)
class TrainingDisplay:
    """A run's state as a renderable that fills the width and height."""

    state: RunState

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Progress, facts, the chart, and the predictions, which are cut only if there is no room."""
        from rich.text import Text

        state, width, ascii_only = self.state, options.max_width, options.ascii_only
        height = options.height or options.max_height
        gap = [Text()] if height >= AIRY else []
        lines = [_bar(state, width, ascii_only), *gap, *_facts(state, width), *gap]
        histories = tuple(state.predictions.values())
        paragraphs = [
            _paragraph(console, width, history[-1].prompt, history[-1].text) for history in histories
        ]
        title = (
            [Text(f"predictions at step {max(one[-1].step for one in histories):,}", "dim")]
            if paragraphs
            else []
        )
        note = _paragraph(console, width, "note: ", state.note)[:2] if state.note else []
        room = height - len(lines) - len(title) - len(note) - len(gap) * (2 if note else 1)
        if room >= LEAST_LINES + min(len(paragraphs), LEAST_PREDICTIONS) and width >= LEAST_WIDTH:
            chart = max(LEAST_LINES, room - sum(map(len, paragraphs)))
            lines += [*loss_lines(state, width, chart, ascii_only), *gap]
            room -= chart
        for line in [*lines, *title, *_fitted(paragraphs, room), *(gap if note else ()), *note][:height]:
            line.no_wrap, line.overflow = True, "ellipsis"
            yield line


def loss_lines(state: RunState, width: int, height: int, ascii_only: bool) -> list[Text]:
    """The chart in this many lines; empty lines until there are two losses."""
    from rich.text import Text

    # The training thread continues meanwhile, and an array that numpy reads from cannot grow.
    losses, held_out = (np.array(points[:]).reshape(-1, 2) for points in (state.curve, state.held_out))
    if len(losses) < 2:
        return [Text(WAITING, "dim"), *(Text() for _ in range(height - 1))]
    return loss_chart(losses, held_out, width, height, ascii_only)


def _bar(state: RunState, width: int, ascii_only: bool) -> Text:
    """The run, its step, and its progress."""
    from rich.text import Text

    done = state.step.step if state.step else state.first
    share = done / max(1, state.until)
    step, percent = f"  step {done:,} of {state.until:,}  ", f"  {share:.1%}"
    name = Text(state.run, "bold")
    name.truncate(max(1, width - len(step) - len(percent) - SHORTEST_BAR), overflow="ellipsis")
    room = max(0, width - name.cell_len - len(step) - len(percent))
    full, rest = "=-" if ascii_only else "━━"
    filled = int(share * room)
    return Text.assemble(
        name, step, (full * filled, "cyan"), (rest * (room - filled), "bright_black"), percent
    )


def _facts(state: RunState, width: int) -> list[Text]:
    """The facts in as many columns as fit, in column order."""
    from rich.text import Text

    facts = known(state, time.monotonic())
    columns = max(1, width // FACT_WIDTH)
    rows = -(-len(facts) // columns)
    lines = [Text() for _ in range(rows)]
    for number, (name, value) in enumerate(facts.items()):
        fact = Text.assemble((f"{name:<{LABEL_WIDTH}}", "dim"), value)
        fact.truncate(width // columns - 1, overflow="ellipsis", pad=True)
        lines[number % rows].append_text(fact)
    return lines


def known(state: RunState, now: float) -> dict[str, str]:
    """The facts by name, without unknown ones.

    Args:
        state: of the run.
        now: time.monotonic().
    """
    step, check, saved = state.step, state.validation, state.checkpoint
    facts: dict[str, str] = {}
    if step is not None:
        facts["loss"] = number(step.loss, ".4f")
        if check is not None:
            facts["held out"] = bits_per_byte(check)
        facts["schedule"] = f"{step.phase}, lr {step.learning_rate:.3g}"
        skipped = f", {step.skipped:,} steps skipped" if step.skipped else ""
        facts["gradient"] = f"norm {number(step.gradient_norm, '.3g')}{skipped}"
        epoch = step.tokens / max(1, state.corpus_tokens)
        facts["epoch"] = f"{epoch:.3g}, {quantity(step.tokens)} tokens"
        mfu = f", MFU {step.mfu:.1%}" if step.mfu is not None else ""
        facts["speed"] = f"{step.tokens_per_second:,.0f} tok/s{mfu}"
        if step.memory_bytes is not None:
            facts["memory"] = size(step.memory_bytes)
    facts["elapsed"] = duration(now - state.at.get("start", now))
    if step is not None:
        facts["time left"] = duration(max(0.0, step.eta_s - (now - state.at["step"])))
    if saved is not None:
        facts["saved"] = f"step {saved.step:,}, {duration(now - state.at['checkpoint'])} ago"
    return facts


def bits_per_byte(check: Validation) -> str:
    """The held-out score with its standard error, if it has one."""
    return f"{with_error(check.bits_per_byte, check.standard_error)} bits/byte"


def number(value: float | None, form: str) -> str:
    """A number of a step, or a note that float16 overflowed."""
    return "overflow" if value is None else format(value, form)


def _paragraph(console: Console, width: int, head: str, text: str) -> list[Text]:
    """A wrapped text after a bold heading, with a hanging indent."""
    from rich.text import Text

    whole = Text.assemble((one_line(head), "bold"), one_line(text))
    first, *others = whole.wrap(console, max(1, width - 2), overflow="fold") or [Text()]
    return [first, *(Text("  ") + line for line in others)]


def _fitted(paragraphs: list[list[Text]], room: int) -> list[Text]:
    """As many lines of each as fit, the same number for all, with an ellipsis if one is cut."""
    from rich.text import Text

    if len(paragraphs) > room > 0:
        more = f"and {len(paragraphs) - room + 1:,} more in predictions.md"
        return [*_fitted(paragraphs[: room - 1], room - 1), Text(more, "dim")]
    most = max(map(len, paragraphs), default=0)
    while most > 1 and sum(min(len(lines), most) for lines in paragraphs) > room:
        most -= 1
    fitted = []
    for lines in paragraphs:
        fitted += lines[:most]
        if len(lines) > most:
            fitted[-1] = Text.assemble(fitted[-1][:-1], "…") if fitted[-1] else Text("…")
    return fitted
