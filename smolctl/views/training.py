"""A run while it goes on: a live display on a terminal, plain lines elsewhere, or JSON lines."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from smolctl.data.tokens.corpus import TokenizeProgress
from smolctl.escaping import one_line
from smolctl.runs.events import (
    Checkpoint,
    End,
    Event,
    Note,
    Prediction,
    RunPlan,
    Start,
    Step,
    Validation,
    to_json,
)
from smolctl.runs.folder import RunFolder
from smolctl.runs.story import History, selection
from smolctl.timing import with_error
from smolctl.views.numbers import duration, quantity, size, sparkline
from smolctl.views.output import Output
from smolctl.views.tables import GAP, facts

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.table import Table

    from smolctl.training.verify import Verification

# Where there is no terminal, a line of progress at most every so many seconds.
PLAIN_INTERVAL = 5.0
REDRAWS_PER_SECOND = 4
SPARKLINE_WIDTH = 60  # columns at most
VERSIONS_SHOWN = 5  # of every prompt's answer, when the run has ended


class TrainingView:
    """Listens to the events of a run and shows them. A context manager: leaving it ends the display."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self.live: Live | None = None
        self.losses: list[float] = []
        self.predictions: dict[str, History] = {}
        self.run = ""
        self.until = 0
        self.first = 0
        self.step: Step | None = None
        self.validation: Validation | None = None
        self.checkpoint: Checkpoint | None = None
        self.checkpoint_at = 0.0
        self._last_line = 0.0
        self._tokenizing = False

    def __enter__(self) -> TrainingView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_live()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        self.out.event(to_json(event))
        self._remember(event)
        if self.out.json:
            return
        if isinstance(event, Note):
            self._note(event)
        elif self.out.quiet:
            return
        elif isinstance(event, Start):
            self._start(event)
        elif isinstance(event, End):
            self._end(event)
        elif self.live is None:
            self._plain_line(event)

    def tokenizing(self, progress: TokenizeProgress) -> None:
        """Show how far the tokenization is, on one line of the terminal."""
        if self.out.quiet or self.out.json:
            return
        console = self.out.stderr
        share = f" of {size(progress.bytes_total)}" if progress.bytes_total else ""
        text = f"Tokenizing: {size(progress.bytes_read)}{share}, {quantity(progress.tokens)} tokens"
        now = time.monotonic()
        if console.is_terminal:
            console.print(f"\r{text}", end="", markup=False, highlight=False)
            self._tokenizing = True
        elif now - self._last_line >= PLAIN_INTERVAL:
            self._last_line = now
            self.out.talk(text)

    def show_plan(self, plan: RunPlan) -> None:
        """The plan as a table, or as one JSON document."""
        self._end_tokenizing()
        self.out.show(plan_table(plan))

    def show_verification(self, verification: Verification) -> None:
        """Whether the repeated steps were the same, in one line, and what differed."""
        self._end_tokenizing()
        self.out.event({"event": "verification", **asdict(verification), "exact": verification.exact})
        steps = f"Steps {verification.first + 1:,} to {verification.last:,} of {verification.run}"
        compared = f"{verification.tensors:,} tensors and the losses of {verification.losses:,} steps"
        if verification.exact:
            self.out.show(f"{steps} repeat bit for bit: {compared} are equal.")
            return
        self.out.show(f"{steps} do NOT repeat ({compared} compared). What differs:")
        for difference in verification.differences:
            self.out.show(f"  {difference}")

    def _remember(self, event: Event) -> None:
        if not isinstance(event, Note):
            self._end_tokenizing()
        if isinstance(event, Start):
            self.run, self.until, self.first = event.run, event.until, event.step
            self.predictions = RunFolder(Path(event.run)).predictions()  # of the sessions before
        elif isinstance(event, Step):
            self.step = event
            if event.loss is not None:
                self.losses.append(event.loss)
        elif isinstance(event, Prediction):
            self.predictions[event.prompt] = (*self.predictions.get(event.prompt, ()), event)
        elif isinstance(event, Validation):
            self.validation = event
        elif isinstance(event, Checkpoint):
            self.checkpoint, self.checkpoint_at = event, time.monotonic()

    def _end_tokenizing(self) -> None:
        if self._tokenizing:
            self._tokenizing = False
            self.out.stderr.print()

    def _start(self, event: Start) -> None:
        self.show_plan(event.plan)
        goes_on = f"continues after step {event.step:,}" if event.step else "starts"
        self.out.line(f"{event.run} {goes_on}, until step {event.until:,}")
        if self.out.stdout.is_terminal:
            from rich.live import Live

            self.live = Live(
                get_renderable=self._panel,
                console=self.out.stdout,
                refresh_per_second=REDRAWS_PER_SECOND,
                transient=True,
            )
            self.live.start()

    def _note(self, event: Note) -> None:
        if self.live is not None and self.out.stderr.is_terminal:
            if not self.out.quiet:  # above the display, which knows of no other console
                self.live.console.print(event.text, markup=False, highlight=False)
        else:
            self.out.talk(event.text)

    def _close_live(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _end(self, event: End) -> None:
        self._close_live()
        why = "" if event.reason == "done" else f" by {event.reason}"
        loss = f", loss {_number(self.step.loss, '.4f')}" if self.step else ""
        check = f", held out {_held_out(self.validation)}" if self.validation else ""
        if self.predictions:
            self.out.show(self._predictions_table())
        self.out.line(f"Ended{why} at step {event.step:,} after {duration(event.seconds)}{loss}{check}.")
        told = " predictions.md," if self.predictions else ""
        self.out.line(f"{event.run}: checkpoints, metrics.jsonl,{told} loss.png")
        target = "" if event.reason == "done" else f"; continue with: smolctl resume {event.run}"
        self.out.talk(f"Try it: smolctl sample {event.run}{target}")

    def _plain_line(self, event: Event) -> None:
        if isinstance(event, Step):
            now = time.monotonic()
            if event.step not in (self.first + 1, self.until) and now - self._last_line < PLAIN_INTERVAL:
                return
            self._last_line = now
            self.out.line(
                f"step {event.step:,}/{self.until:,}  loss {_number(event.loss, '.4f')}  "
                f"lr {event.learning_rate:.3g}  gradient {_number(event.gradient_norm, '.3g')}  "
                f"{_speed(event, '  ')}  ETA {duration(event.eta_s)}"
            )
        elif isinstance(event, Validation):
            self.out.line(f"step {event.step:,}  held out: {_held_out(event)}, loss {event.loss:.4f}")
        elif isinstance(event, Checkpoint):
            self.out.line(
                f"step {event.step:,}  saved {event.path} ({size(event.bytes)}, {event.seconds:.1f} s)"
            )
        elif isinstance(event, Prediction):
            self.out.line(f"step {event.step:,}  {one_line(event.prompt)} → {one_line(event.text)}")

    def _panel(self) -> RenderableType:
        """The display as it stands. Drawn from a thread of its own, four times a second."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table
        from rich.text import Text

        done = self.step.step if self.step else self.first
        end = Column(no_wrap=True)
        bar = Table.grid(end, Column(ratio=1), end.copy(), expand=True, padding=GAP)
        bar.add_row(
            f"step {done:,} of {self.until:,}",
            ProgressBar(total=self.until, completed=done),
            f"{done / max(1, self.until):.1%}",
        )
        rows: list[RenderableType] = [bar, self._numbers()]
        if self.predictions:
            rows += ["", self._latest_predictions()]
        return Panel(Group(*rows), title=Text(self.run), title_align="left")

    def _numbers(self) -> RenderableType:
        from rich.table import Column, Table
        from rich.text import Text

        step, check, saved = self.step, self.validation, self.checkpoint
        table = Table.grid(
            Column(style="dim", no_wrap=True), Column(no_wrap=True, overflow="ellipsis"), padding=GAP
        )
        if step is not None:
            width = max(8, min(self.out.stdout.width - 30, SPARKLINE_WIDTH))
            bars = sparkline(self.losses[-width * 4 :], width)
            table.add_row("loss", Text.assemble((_number(step.loss, ".4f"), "bold"), f"   {bars}"))
        if check is not None:
            table.add_row("held out", f"{_held_out(check)} at step {check.step:,}")
        if step is not None:
            skipped = f"   {step.skipped:,} steps skipped" if step.skipped else ""
            norm = _number(step.gradient_norm, ".3g")
            table.add_row("update", f"lr {step.learning_rate:.3g}   gradient norm {norm}{skipped}")
            table.add_row("speed", f"{_speed(step, '   ')}   {quantity(step.tokens)} tokens so far")
            table.add_row("ETA", duration(step.eta_s))
        else:
            table.add_row("", "waiting for the first step …")
        if saved is not None:
            ago = duration(time.monotonic() - self.checkpoint_at)
            table.add_row("saved", f"step {saved.step:,}, {ago} ago")
        return table

    def _latest_predictions(self) -> RenderableType:
        """A line a prompt: the prompt, at most two fifths of the line, and how the model goes on."""
        from rich.table import Table
        from rich.text import Text

        latest = [history[-1] for history in tuple(self.predictions.values())]
        prompts = [Text(one_line(prediction.prompt), style="bold") for prediction in latest]
        newest = max(prediction.step for prediction in latest)
        widest = max(prompt.cell_len for prompt in prompts)
        table = Table.grid(expand=True, padding=GAP)
        table.title = Text(f"predictions at step {newest:,}", style="dim", justify="left")
        table.add_column(no_wrap=True, overflow="ellipsis", width=min(widest, self.out.stdout.width * 2 // 5))
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for prompt, prediction in zip(prompts, latest, strict=True):
            table.add_row(prompt, Text(one_line(prediction.text)))
        return table

    def _predictions_table(self) -> RenderableType:
        """How the answer to every prompt changed: its first version, some in between, its last."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Predictions", title_justify="left", box=None, padding=(0, 1))
        table.add_column("prompt", style="bold", max_width=24, no_wrap=True, overflow="ellipsis")
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("continuation", overflow="fold")
        for prompt, history in self.predictions.items():
            for number, event in enumerate(selection(history, VERSIONS_SHOWN)):
                name = Text(one_line(prompt)) if number == 0 else Text("")
                table.add_row(name, f"{event.step:,}", Text(one_line(event.text)))
        return table


def _number(value: float | None, form: str) -> str:
    """A number of a step, or that float16 has overflowed in it."""
    return "overflow" if value is None else format(value, form)


def _held_out(check: Validation) -> str:
    return f"{with_error(check.bits_per_byte, check.standard_error)} bits/byte"


def _speed(step: Step, gap: str) -> str:
    """Tokens a second, MFU and memory, as far as they are known."""
    facts = [f"{step.tokens_per_second:,.0f} tok/s"]
    if step.mfu is not None:
        facts.append(f"MFU {step.mfu:.1%}")
    if step.memory_bytes is not None:
        facts.append(f"memory {size(step.memory_bytes)}")
    return gap.join(facts)


def plan_table(plan: RunPlan) -> Table:
    """What the run will cost, one line a fact."""
    shares = {name: count for name, count in vars(plan.memory).items() if name != "formulas"}
    shares |= {"libraries": plan.framework_bytes, "allocator's gaps": plan.gap_bytes}
    held = ", ".join(f"{name} {size(count)}" for name, count in shares.items() if count)
    tokens = f"{plan.steps:,} steps × {plan.batch_size:,} × {plan.sequence_length:,} = {plan.tokens:,} tokens"
    checkpoints = f"{plan.checkpoints_kept} checkpoints × {size(plan.checkpoint_bytes)}"
    held_out = f"{plan.held_out_tokens:,} tokens" if plan.held_out_tokens else "nothing"
    copies = f", {plan.duplicates:,} of them copies of others" if plan.duplicates else ""
    rows = {
        "model": f"{plan.parameters:,} parameters",
        "tokens": tokens,
        "data": f"{plan.corpus_tokens:,} tokens: {plan.epochs:.3g} epochs, "
        f"{plan.tokens_per_parameter:.3g} tokens a parameter; {held_out} held out",
        "documents": f"{plan.documents:,}{copies}",
        "memory": f"about {size(plan.memory_bytes)}: {held}",
        "disk": f"{checkpoints} = {size(plan.disk_bytes)} of {size(plan.disk_free_bytes)} free",
        "time": f"about {duration(plan.eta_s)} on {plan.device} at {plan.tokens_per_second:,.0f} tok/s, "
        "measured on one micro-batch",
    }
    table = facts(rows.items(), style="bold")
    table.title, table.title_justify = "Plan", "left"
    return table
