"""What `smolctl sample` prints: text as it streams, a line of JSON for every prompt of a file, a session."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from smolctl.errors import InputError
from smolctl.escaping import json_text
from smolctl.generation.answer import Completion
from smolctl.generation.complete import CompletionResult, CompletionSettings
from smolctl.generation.conversation import Session
from smolctl.generation.load import LoadedModel
from smolctl.generation.many import Batch
from smolctl.generation.sample import Loaded, Rendered, SampleResult, Streamed
from smolctl.views.completions import (
    completion_json,
    show_explanation,
    show_side_by_side,
    timing_line,
    to_json,
)
from smolctl.views.output import Output

PROGRESS_S = 5.0  # seconds between two lines of progress
HELP = "/reset starts a new conversation, /help shows this, Ctrl-C stops an answer, Ctrl-D ends."


class SampleView:
    """Prints events as they come, and the result."""

    def __init__(self, out: Output, settings: CompletionSettings) -> None:
        self.out, self.settings = out, settings
        self._stream = StreamView(out, settings.samples)

    def __call__(self, event: Loaded | Rendered | Streamed) -> None:
        match event:
            case Loaded(model):
                for note in model.notes:
                    self.out.talk(f"{model.id}: {note}")
            case Rendered(prompt) if self.out.verbose:
                self.out.talk(f"prompt as the model sees it:\n{prompt}")
            case Streamed(sample, text):
                self._stream(sample, text)

    def show(self, result: SampleResult | Batch | Session) -> None:
        match result:
            case Batch():
                _show_batch(self.out, result)
            case Session():
                _converse(self.out, result)
            case SampleResult(((model, completions),)):
                self._stream.close()
                _show_facts(self.out, model, completions)
                self.out.document(to_json(model, completions))
            case SampleResult(by_model, divergences):
                show_side_by_side(self.out, by_model, divergences)
                for model, completions in by_model if self.settings.alternatives else ():
                    self.out.line(model.id)
                    show_explanation(self.out, model, completions)
                documents = [
                    to_json(model, completions, divergences[number] if divergences else None)
                    for number, (model, completions) in enumerate(by_model)
                ]
                self.out.document({"models": documents})


class StreamView:
    """Prints the pieces of one prompt's completions as they come."""

    def __init__(self, out: Output, samples: int) -> None:
        self.out = out
        self.samples = samples
        self.pieces: list[list[str]] = [[] for _ in range(samples)]

    def __call__(self, sample: int, text: str) -> None:
        """Take a piece of text. Several samples are printed one after the other when all are complete."""
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


def _show_facts(out: Output, model: LoadedModel, result: CompletionResult) -> None:
    """The tokens of an answer, where they were asked for, and how long it took."""
    if result.completions[0].alternatives is not None:
        show_explanation(out, model, result)
    if not out.json:
        out.talk(timing_line(model, result.timing))


def _show_batch(out: Output, batch: Batch) -> None:
    """A line of JSON for every prompt, in the order of the file, with progress beside them.

    A line holds the fields of its prompt and the completions. An interrupt loses none that are finished.
    """
    started = reported = time.perf_counter()
    done = tokens = printed = 0
    waiting: dict[int, tuple[Completion, ...]] = {}

    def write(index: int) -> None:
        completions = [completion_json(completion) for completion in waiting.pop(index)]
        line = {**batch.prompts[index], "completions": completions}
        print(json_text(line), flush=True)

    def report(now: float) -> None:
        seconds = now - started
        out.talk(
            f"{done:,} of {len(batch.prompts):,} prompts, {tokens:,} tokens in "
            f"{seconds:.1f} s, {tokens / seconds:,.1f} tok/s"
        )

    try:
        for index, completions in batch.completions:
            waiting[index] = completions
            done += 1
            tokens += sum(len(completion.tokens) for completion in completions)
            while printed in waiting:
                write(printed)
                printed += 1
            now = time.perf_counter()
            if now - reported >= PROGRESS_S and done < len(batch.prompts):
                reported = now
                report(now)
    finally:
        for index in sorted(waiting):
            write(index)
        report(time.perf_counter())


def _converse(out: Output, session: Session) -> None:
    """Answer questions until the input ends."""
    mode = "chatting with the model's template" if session.conversation.chat else "each prompt stands alone"
    out.talk(f"{session.model.id}: {mode}. {HELP}")
    for text in _questions(out):
        if text.strip() == "/help":
            out.talk(HELP)
        elif text.strip() == "/reset":
            session.conversation.turns.clear()
            out.talk("New conversation.")
        else:
            _answer(out, session, text)


def _questions(out: Output) -> Iterator[str]:
    """What the user types, line by line."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 - gives `input` arrow keys and a history
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            out.talk("Ctrl-D ends.")
            continue
        if text.strip():
            yield text


def _answer(out: Output, session: Session, text: str) -> None:
    """One turn of a session; its errors and Ctrl-C end the turn only."""
    view = StreamView(out, session.settings.samples)
    try:
        if forgotten := session.make_room(text):
            turns = "turn was" if forgotten == 1 else f"{forgotten} turns were"
            out.talk(f"The context of {session.capacity:,} tokens is full: the oldest {turns} dropped.")
        result = session.answer(text, view)
    except InputError as error:
        out.error(error)
        return
    except KeyboardInterrupt:
        view.close()
        out.talk("Stopped.")
        return
    view.close()
    _show_facts(out, session.model, result)
