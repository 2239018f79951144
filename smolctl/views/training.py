"""A running training: a live display on a terminal, otherwise plain lines, or JSON lines."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, suppress
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

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
from smolctl.runs.prediction_history import selection
from smolctl.views.chart import LEAST_WIDTH
from smolctl.views.numbers import counted, duration, size, sparkline
from smolctl.views.output import Output, StdoutError
from smolctl.views.tables import facts
from smolctl.views.tokenizing import PLAIN_INTERVAL, TokenizingView
from smolctl.views.training_display import RunState, TrainingDisplay, bits_per_byte, loss_lines, number

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from smolctl.training.verify import Verification

REDRAWS_PER_SECOND = 1  # a redraw takes about 10 ms of a core, and of the interpreter's lock
FINAL_CHART = 16  # lines of the chart after the run has ended
SCHEDULE_WIDTH = 20  # columns of the plan's curve
EXAMPLE_CHARACTERS = 300  # of each part of the plan's example conversation
VERSIONS_SHOWN = 5  # of the continuation of every prompt, after the run has ended
# These epochs help nearly as much as new text: Muennighoff et al., "Scaling Data-Constrained Language
# Models", 2023.
EPOCHS_LIKE_NEW_TEXT = 4
REPEATS = (
    "After about 4 epochs, reading the same text again helps little, and the held-out score can get worse. "
    "The best checkpoint is RUN@best; --set train.patience=3 stops after 3 validations without improvement."
)


class TrainingView:
    """Shows the events of a run. A context manager: leaving it ends the display."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self.state = RunState()
        self.tokenizing = TokenizingView(out)
        self._screen: ExitStack | None = None  # during the live display
        self._last_line = 0.0

    def __enter__(self) -> TrainingView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._screen is None:
            self.tokenizing.close()
            return
        with suppress(OSError):
            self._close()
            if self.state.step is not None:  # an error ends the run: show how far it has come
                self.out.line(self._step_line(self.state.step))

    def __call__(self, event: Event) -> None:
        """Show one event. The run continues if its terminal is closed, its output pipe has no reader, or the
        disk has no space for its output.
        """
        with suppress(OSError):
            try:
                self._show(event)
            except StdoutError as error:
                self.out.message(f"{error.message}; training continues.")

    def _show(self, event: Event) -> None:
        self.out.event(to_json(event))
        self.tokenizing.close()
        self.state(event)
        if self.out.json:
            return
        if isinstance(event, Note):
            self.out.message(event.text)
        elif self.out.quiet:
            return
        elif isinstance(event, Start):
            self._start(event)
        elif isinstance(event, End):
            self._end(event)
        elif self._screen is None:
            self._plain_line(event)

    def show_plan(self, plan: RunPlan) -> None:
        """Show the plan as a table or as one JSON document."""
        self.tokenizing.close()
        self.out.show(plan_table(plan))

    def show_verification(self, verification: Verification) -> None:
        """Show whether the repeated steps were the same, in one line, and the differences."""
        self.tokenizing.close()
        self.out.event({"event": "verification", **asdict(verification), "exact": verification.exact})
        steps = f"Steps {verification.first + 1:,} to {verification.last:,} of {verification.run}"
        compared = (
            f"{verification.tensors:,} tensors and the losses of {counted(verification.losses, 'step')}"
        )
        if verification.exact:
            self.out.show(f"{steps} repeat bit for bit: {compared} are equal.")
            return
        self.out.show(f"{steps} do NOT repeat ({compared} compared). What differs:")
        for difference in verification.differences:
            self.out.show(f"  {difference}")

    def _start(self, event: Start) -> None:
        self.show_plan(event.plan)
        goes_on = f"continues after step {event.step:,}" if event.step else "starts"
        self.out.line(f"{event.run} {goes_on}, until step {event.until:,}")
        if self.out.stdout.is_interactive:
            self._open()

    def _open(self) -> None:
        """Open the display on the terminal's alternate screen; afterwards the first screen is restored.

        Output to stderr would disturb the display, so it is held back until the display ends.
        """
        from rich.live import Live

        self._screen, said = ExitStack(), io.StringIO()
        if self.out.stderr.is_terminal:
            stderr = sys.stderr
            self._screen.callback(lambda: print(said.getvalue(), end="", file=stderr))
            self._screen.enter_context(redirect_stderr(said))
        live = Live(
            TrainingDisplay(self.state),
            console=self.out.stdout,
            screen=True,
            refresh_per_second=REDRAWS_PER_SECOND,
            redirect_stderr=False,
        )
        self._screen.enter_context(live)

    def _close(self) -> None:
        if self._screen is not None:
            screen, self._screen = self._screen, None
            screen.close()

    def _end(self, event: End) -> None:
        if self._screen is None:
            self._show_predictions()
            self._plain_summary(event)
            return
        self._close()
        self._show_chart()
        self._show_predictions()
        self._show_summary(event)

    def _show_chart(self) -> None:
        console = self.out.stdout
        if len(self.state.curve) > 2 and console.width >= LEAST_WIDTH:
            chart = loss_lines(self.state, console.width, FINAL_CHART, console.options.ascii_only)
            self.out.show("", *chart, "")

    def _show_summary(self, event: End) -> None:
        """Print the summary that remains after the display."""
        done = event.reason == "done"
        name, why = ("done", "") if done else ("stopped", f"by {event.reason} at ")
        after = duration(event.seconds)
        rows = {name: f"{why}step {event.step:,} of {self.state.until:,} after {after}"}
        if self.state.step is not None:
            rows["loss"] = number(self.state.step.loss, ".4f")
        if self.state.validation is not None:
            rows["held out"] = (
                f"{bits_per_byte(self.state.validation)} at step {self.state.validation.step:,}"
            )
        if event.best_step not in (None, event.step):
            rows["best"] = f"{event.best_bits_per_byte:.4f} bits/byte at {_best_step(event)}"
        rows["saved in"] = f"{event.run}: {self._records()}"
        if not done:
            rows["continue"] = f"smolctl resume {event.run}"
        rows["try it"] = f"smolctl sample {event.run}{self._chat_option}"
        self.out.show("", facts(rows.items(), style="bold"))

    def _plain_summary(self, event: End) -> None:
        state = self.state
        why = "" if event.reason == "done" else f" by {event.reason}"
        loss = f", loss {number(state.step.loss, '.4f')}" if state.step else ""
        check = f", held out {bits_per_byte(state.validation)}" if state.validation else ""
        if event.best_step not in (None, event.step):
            check += f", best {event.best_bits_per_byte:.4f} at {_best_step(event)}"
        self.out.line(f"Ended{why} at step {event.step:,} after {duration(event.seconds)}{loss}{check}.")
        self.out.line(f"{event.run}: {self._records()}")
        target = "" if event.reason == "done" else f"; continue with: smolctl resume {event.run}"
        self.out.message(f"Try it: smolctl sample {event.run}{self._chat_option}{target}")

    @property
    def _chat_option(self) -> str:
        return " --chat" if self.state.is_chat else ""

    def _records(self) -> str:
        predictions = " predictions.md," if self.state.predictions else ""
        return f"checkpoints, metrics.jsonl,{predictions} loss.png, report.html"

    def _plain_line(self, event: Event) -> None:
        if isinstance(event, Step):
            now = time.monotonic()
            ends = (self.state.first + 1, self.state.until)
            if event.step not in ends and now - self._last_line < PLAIN_INTERVAL:
                return
            self._last_line = now
            self.out.line(self._step_line(event))
        elif isinstance(event, Validation):
            self.out.line(f"step {event.step:,}  held out: {bits_per_byte(event)}, loss {event.loss:.4f}")
        elif isinstance(event, Checkpoint):
            self.out.line(
                f"step {event.step:,}  saved {event.path} ({size(event.bytes)}, {event.seconds:.1f} s)"
            )
        elif isinstance(event, Prediction):
            self.out.line(f"step {event.step:,}  {one_line(event.prompt)} → {one_line(event.text)}")

    def _step_line(self, step: Step) -> str:
        speed = [f"{step.tokens_per_second:,.0f} tok/s"]
        if step.mfu is not None:
            speed.append(f"MFU {step.mfu:.1%}")
        if step.memory_bytes is not None:
            speed.append(f"memory {size(step.memory_bytes)}")
        z_loss = "" if step.z_loss is None else f"z-loss {step.z_loss:.4f}  "
        return (
            f"step {step.step:,}/{self.state.until:,}  loss {number(step.loss, '.4f')}  {z_loss}"
            f"lr {step.learning_rate:.3g}  gradient {number(step.gradient_norm, '.3g')}  "
            f"{'  '.join(speed)}  ETA {duration(step.eta_s)}"
        )

    def _show_predictions(self) -> None:
        """How the continuation of every prompt changed: the first version, some in between, the last."""
        if not self.state.predictions:
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Predictions", title_justify="left", box=None, padding=(0, 1))
        table.add_column("prompt", style="bold", max_width=24, no_wrap=True, overflow="ellipsis")
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("continuation", overflow="fold")
        for prompt, history in self.state.predictions.items():
            for row, event in enumerate(selection(history, VERSIONS_SHOWN)):
                name = Text(one_line(prompt)) if row == 0 else Text("")
                table.add_row(name, f"{event.step:,}", Text(one_line(event.text)))
        self.out.show(table)


def _schedule(plan: RunPlan) -> str:
    """The learning rate of the remaining steps: its curve, its ends, and the number of steps in each
    phase.
    """
    seen = plan.schedule
    parts = {
        "warming up": seen.warmup_steps,
        "at the peak": plan.steps - seen.warmup_steps - seen.decay_steps - seen.floor_steps,
        "decaying": seen.decay_steps,
        "at the floor": seen.floor_steps,
    }
    counts = ", ".join(f"{count:,} {part}" for part, count in parts.items() if count)
    short = "; the run ends before the warmup does" if seen.warmup_steps == plan.steps else ""
    curve = sparkline(seen.curve, SCHEDULE_WIDTH, low=0.0)
    return f"{curve} {seen.name}: up to {seen.peak:.3g}, {seen.end:.3g} at the end; steps: {counts}{short}"


def _conversations(facts: Mapping[str, Any]) -> str:
    shapes = " and ".join(facts["shapes"])
    conversations = counted(facts["conversations"], "conversation")
    sequences = counted(facts["sequences"], "sequence")
    return (
        f"{conversations} ({shapes}), {facts['trained_share']:.0%} of their tokens trained on; "
        f"packed in {sequences}, of which {facts['padding']:.1%} is padding"
    )


def _example(runs: Sequence[tuple[str, bool]]) -> Text:
    """An example conversation, with the trained text highlighted and between marks."""
    from rich.text import Text

    text = Text()
    for part, is_trained in runs:
        shown = part if len(part) <= EXAMPLE_CHARACTERS else f"{part[:EXAMPLE_CHARACTERS]}…"
        text.append(f"⟦{shown}⟧" if is_trained else shown, style="bold green" if is_trained else "dim")
    return text


def _best_step(event: End) -> str:
    """The run's best step, and the name of its checkpoint if it was kept."""
    return f"step {event.best_step:,}" + f" ({event.run}@best)" * event.best_is_kept


def plan_table(plan: RunPlan) -> Table:
    """The cost of the run, one fact per line."""
    from rich.text import Text

    shares = {name: count for name, count in vars(plan.memory).items() if name != "formulas"}
    shares |= {"libraries": plan.framework_bytes, "allocator's gaps": plan.gap_bytes}
    held = ", ".join(f"{name} {size(count)}" for name, count in shares.items() if count)
    limit, when = ("at most", " before compiling") if plan.compiles else ("about", "")
    sequences = f"{plan.batch_size:,} × {plan.sequence_length:,}"
    tokens = f"{counted(plan.steps, 'step')} × {sequences} = {plan.tokens:,} tokens"
    checkpoints = f"{counted(plan.checkpoints_kept, 'checkpoint')} × {size(plan.checkpoint_bytes)}"
    held_out = f"{plan.held_out_tokens:,} tokens" if plan.held_out_tokens else "nothing"
    alike = "with the text or the group of another" if plan.conversations else "copies of others"
    copies = f", {plan.duplicates:,} of them {alike}" if plan.duplicates else ""
    rows = {
        "model": f"{plan.parameters:,} parameters",
        "tokens": tokens,
        "data": f"{plan.corpus_tokens:,} tokens: {plan.epochs:.3g} epochs, "
        f"{plan.tokens_per_parameter:.3g} tokens per parameter; {held_out} held out",
        "documents": f"{plan.documents:,}{copies}",
        **({"repeats": REPEATS} if plan.epochs > EPOCHS_LIKE_NEW_TEXT else {}),
        "schedule": _schedule(plan),
        "memory": f"about {size(plan.memory_bytes)}: {held}",
        "disk": f"{checkpoints} = {size(plan.disk_bytes)} of {size(plan.disk_free_bytes)} free",
        "time": f"{limit} {duration(plan.eta_s)} on {plan.device} at {plan.tokens_per_second:,.0f} tok/s, "
        f"measured on one micro-batch{when}",
    }
    table = facts(rows.items(), style="bold")
    if chat := plan.conversations:
        table.add_row("answers", _conversations(chat))
        table.add_row("for example", _example(chat["example"]))
    if plan.read:
        table.add_row("read", Text("\n".join(plan.read)))
    table.title, table.title_justify = "Plan", "left"
    return table
