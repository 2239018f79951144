"""A run while it goes on: a live display on a terminal, plain lines elsewhere, or JSON lines."""

from __future__ import annotations

import time
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING

from smolctl.data.shards import TokenizeProgress
from smolctl.training.events import (
    Checkpoint,
    End,
    Event,
    Note,
    Prediction,
    Start,
    Step,
    Validation,
    to_json,
)
from smolctl.training.plan import Plan
from smolctl.views.numbers import duration, quantity, size, sparkline
from smolctl.views.output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.table import Table

    from smolctl.training.verify import Verification

# Where there is no terminal, a line of progress at most every so many seconds.
PLAIN_INTERVAL = 5.0
REDRAWS_PER_SECOND = 4


class TrainingView:
    """Listens to the events of a run and shows them. A context manager: leaving it ends the display."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self.live: Live | None = None
        self.losses: list[float] = []
        self.predictions: dict[str, list[Prediction]] = {}
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
            self.out.talk(event.text)
        elif self.out.quiet:
            return
        elif isinstance(event, Start):
            self._start(event)
        elif isinstance(event, End):
            self._end(event)
        elif self.live is not None:
            self.live.update(self._panel())
        else:
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

    def show_plan(self, plan: Plan) -> None:
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
            self.until, self.first = event.until, event.step
        elif isinstance(event, Step):
            self.step = event
            self.losses.append(event.loss)
        elif isinstance(event, Prediction):
            self.predictions.setdefault(event.prompt, []).append(event)
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
        self.out.show(f"{event.run} {goes_on}, until step {event.until:,}")
        if self.out.stdout.is_terminal:
            from rich.live import Live

            self.live = Live(
                self._panel(), console=self.out.stdout, refresh_per_second=REDRAWS_PER_SECOND, transient=True
            )
            self.live.start()

    def _close_live(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _end(self, event: End) -> None:
        self._close_live()
        why = "" if event.reason == "done" else f" by {event.reason}"
        loss = f", loss {self.step.loss:.4f}" if self.step else ""
        held_out = self.validation
        check = (
            f", held out {held_out.bits_per_byte:.4f} ± {held_out.standard_error:.4f} bits/byte"
            if held_out
            else ""
        )
        if self.predictions:
            self.out.show(self._predictions_table())
        self.out.show(f"Ended{why} at step {event.step:,} after {duration(event.seconds)}{loss}{check}.")
        self.out.show(f"{event.run}: checkpoints, metrics.jsonl, predictions.jsonl, loss.png")
        target = "" if event.reason == "done" else f"; go on with: smolctl resume {event.run}"
        self.out.talk(f"Try it: smolctl sample {event.run}{target}")

    def _plain_line(self, event: Event) -> None:
        if isinstance(event, Step):
            now = time.monotonic()
            if event.step not in (self.first + 1, self.until) and now - self._last_line < PLAIN_INTERVAL:
                return
            self._last_line = now
            self.out.line(
                f"step {event.step:,}/{self.until:,}  loss {event.loss:.4f}  lr {event.learning_rate:.3g}  "
                f"gradient {event.gradient_norm:.3g}  {event.tokens_per_second:,.0f} tok/s  "
                f"ETA {duration(event.eta_s)}"
            )
        elif isinstance(event, Validation):
            self.out.line(
                f"step {event.step:,}  held out: {event.bits_per_byte:.4f} ± {event.standard_error:.4f} "
                f"bits/byte, loss {event.loss:.4f}"
            )
        elif isinstance(event, Checkpoint):
            self.out.line(
                f"step {event.step:,}  saved {event.path} ({size(event.bytes)}, {event.seconds:.1f} s)"
            )
        elif isinstance(event, Prediction):
            self.out.line(f"step {event.step:,}  {one_line(event.prompt)} → {one_line(event.text)}")

    def _panel(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        done = self.step.step if self.step else self.first
        bar = Table.grid(expand=True)  # alone, a ProgressBar does not end its line
        bar.add_row(ProgressBar(total=self.until, completed=done))
        rows: list[RenderableType] = [bar, self._numbers()]
        if self.predictions:
            rows.append(self._latest_predictions())
        return Panel(Group(*rows), title=f"step {done:,} of {self.until:,}", title_align="left")

    def _numbers(self) -> Table:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        step, check = self.step, self.validation
        if step is None:
            table.add_row("waiting for the first step …")
            return table
        width = max(10, self.out.stdout.width - 40)
        table.add_row(
            "loss", f"[bold]{step.loss:.4f}[/bold]  {sparkline(self.losses[-width * 4 :], min(width, 48))}"
        )
        if check:
            table.add_row(
                "held out",
                f"{check.bits_per_byte:.4f} ± {check.standard_error:.4f} bits/byte at step {check.step:,}",
            )
        table.add_row("lr", f"{step.learning_rate:.3g}   gradient norm {step.gradient_norm:.3g}")
        table.add_row(
            "speed",
            f"{step.tokens_per_second:,.0f} tok/s   {quantity(step.tokens)} tokens   "
            f"ETA {duration(step.eta_s)}",
        )
        if self.checkpoint:
            ago = duration(time.monotonic() - self.checkpoint_at)
            table.add_row("saved", f"step {self.checkpoint.step:,}, {ago} ago")
        return table

    def _latest_predictions(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid()
        table.add_column(no_wrap=True, overflow="ellipsis")
        newest = max(history[-1].step for history in self.predictions.values())
        table.add_row(Text(f"predictions at step {newest:,}", style="dim"))
        for prompt, history in self.predictions.items():
            table.add_row(Text.assemble((one_line(prompt), "bold"), one_line(history[-1].text)))
        return table

    def _predictions_table(self) -> Table:
        """How the answer to every prompt changed: its first, middle and last version."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Predictions", title_justify="left", box=None, padding=(0, 1))
        table.add_column("step", justify="right")
        table.add_column("prompt", style="bold", max_width=24, overflow="fold")
        table.add_column("continuation", overflow="fold")
        for prompt, history in self.predictions.items():
            shown = {event.step: event for event in (history[0], history[len(history) // 2], history[-1])}
            for number, event in enumerate(shown.values()):
                name = Text(one_line(prompt)) if number == 0 else Text("")
                table.add_row(f"{event.step:,}", name, Text(one_line(event.text)))
        return table


def one_line(text: str) -> str:
    """Line breaks and tabs made visible, so that a text takes one line."""
    return text.replace("\n", "⏎").replace("\t", "⇥")


def plan_table(plan: Plan) -> Table:
    """What the run will cost, one line a fact."""
    from rich.table import Table

    table = Table(title="Plan", title_justify="left", box=None, show_header=False, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    memory = plan.memory
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    shares = ", ".join(f"{part} {size(getattr(memory, part))}" for part in parts)
    table.add_row("model", f"{plan.parameters:,} parameters")
    table.add_row(
        "tokens",
        f"{plan.steps:,} steps × {plan.batch_size:,} × {plan.sequence_length:,} = {plan.tokens:,} tokens",
    )
    table.add_row(
        "data",
        f"{plan.corpus_tokens:,} tokens: {plan.passes:.3g} passes, "
        f"{plan.tokens_per_parameter:.3g} tokens a parameter",
    )
    table.add_row("memory", f"about {size(memory.total)}: {shares}")
    table.add_row(
        "disk",
        f"{plan.checkpoints_kept} checkpoints × {size(plan.checkpoint_bytes)} = {size(plan.disk_bytes)} "
        f"of {size(plan.disk_free_bytes)} free",
    )
    table.add_row(
        "time",
        f"about {duration(plan.eta_s)} on {plan.device} at {plan.tokens_per_second:,.0f} tok/s, "
        "measured on one micro-batch",
    )
    return table
