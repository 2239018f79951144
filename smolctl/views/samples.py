"""Output of `smolctl sample`: streamed text, and a JSON line for every prompt of a file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smolctl.durable import writing_alone
from smolctl.errors import InputError, SmolError, UsageError
from smolctl.escaping import json_text
from smolctl.generation.batch import Batch
from smolctl.generation.conversation import Session
from smolctl.generation.sample import Loaded, Rendered, SampleRequest, SampleResult, Streamed
from smolctl.views.completions import (
    StreamView,
    completion_json,
    show_explanation,
    show_facts,
    show_side_by_side,
    to_json,
)
from smolctl.views.numbers import counted
from smolctl.views.output import Output

PROGRESS_S = 5.0  # seconds between two lines of progress
NAMED_LINES = 3  # faulty lines in an error message


class SampleView:
    """Prints events as they arrive, and the result.

    Raises:
        UsageError: stdout is closed.
    """

    def __init__(self, out: Output, request: SampleRequest) -> None:
        if sys.stdout is None:
            raise UsageError(
                "stdout is closed, so the answer cannot be written", "Send it to a file or a pipe."
            )
        self.out, self.request, self.settings = out, request, request.settings
        self._stream = StreamView(out, self.settings.samples)

    def __call__(self, event: Loaded | Rendered | Streamed) -> None:
        match event:
            case Loaded(model, recommended):
                for note in model.notes:
                    self.out.message(f"{model.id}: {note}")
                if recommended:
                    named = (f"{key.replace('_', ' ')} {value:g}" for key, value in recommended.items())
                    self.out.message(
                        f"{model.id}: sampling settings from {model.recommended_in}: {', '.join(named)}."
                    )
                elif model.recommended and len(self.request.models) > 1:
                    self.out.message(
                        f"{model.id}: the sampling settings in {model.recommended_in} are ignored, because "
                        "all models get the same settings."
                    )
                if model.can_chat and self.request.continues_text:
                    self.out.message(
                        f"{model.id}: the prompt is continued as it is. To ask a question, add --chat."
                    )
            case Rendered(prompt) if self.out.verbose:
                self.out.message(f"prompt as the model sees it:\n{prompt}")
            case Streamed(sample, text):
                self._stream(sample, text)

    def show(self, result: SampleResult | Batch | Session) -> None:
        """Print a result, or generate it while printing.

        Raises:
            KeyboardInterrupt: the result was interrupted; its finished part has been printed.
        """
        match result:
            case Batch():
                _show_batch(self.out, result, self.request.resume_output)
            case Session():
                from smolctl.views.chat import Chat  # with prompt_toolkit, only for a chat

                Chat(self.out, result).run()
            case SampleResult():
                self._show_result(result)
                if result.interrupted:
                    raise KeyboardInterrupt

    def _show_result(self, result: SampleResult) -> None:
        by_model, divergences = result.by_model, result.divergences
        if len(self.request.models) < 2:
            ((model, completions),) = by_model
            self._stream.close()
            show_facts(self.out, model, completions, self.settings.max_tokens)
            self.out.document(to_json(model, completions))
            return
        show_side_by_side(self.out, by_model, divergences)
        for model, completions in by_model if self.settings.alternatives else ():
            self.out.line(model.id)
            show_explanation(self.out, model, completions)
        documents = [
            to_json(model, completions, divergences[number] if divergences else None)
            for number, (model, completions) in enumerate(by_model)
        ]
        self.out.document({"models": documents})


def _show_batch(out: Output, batch: Batch, target: Path | None) -> None:
    """Print a JSON line for every line of the file, in order, and progress messages.

    A line has the fields of its prompt and the completions, or the error. After Ctrl-C, the lines that had
    started follow with their text so far.

    Raises:
        InputError: at the end, if lines of the file have no answers.
        SmolError: the target cannot be written.
    """
    lines, started = batch.file.lines, time.perf_counter()
    reported, answered, tokens, cut, written = started, 0, 0, 0, batch.done
    ready: dict[int, dict[str, Any]] = {}  # rows that wait for earlier ones
    if batch.done:
        out.message(f"{batch.done:,} of {len(lines):,} prompts are in {target} already.")

    def report(now: float) -> None:
        seconds = now - started
        shortened = f", {counted(cut, 'answer')} cut at the maximum length" if cut else ""
        out.message(
            f"{answered:,} of {len(lines) - batch.done:,} prompts, {tokens:,} tokens in "
            f"{seconds:.1f} s, {tokens / seconds:,.1f} tok/s{shortened}"
        )

    with _rows_to(out, target, batch.done) as write:

        def write_ready() -> None:
            nonlocal written
            while written in ready:
                write(json_text(ready.pop(written)) + "\n")
                written += 1

        try:
            for index, answers in batch.answers():
                if isinstance(answers, InputError):
                    ready[index] = lines[index].fault_row(answers)
                else:
                    ready[index] = lines[index].row([completion_json(one) for one in answers])
                    answered += 1
                    tokens += sum(len(one.tokens) for one in answers)
                    cut += sum(one.finish_reason == "length" for one in answers)
                write_ready()
                now = time.perf_counter()
                if now - reported >= PROGRESS_S and written < len(lines):
                    reported = now
                    report(now)
        except KeyboardInterrupt:
            for index, answers in batch.interrupt():
                ready.setdefault(index, lines[index].row([completion_json(one) for one in answers]))
            ready = {index: row for index, row in ready.items() if index >= written}
            write_ready()
            raise
        finally:
            report(time.perf_counter())
    if batch.faults:
        raise _faults(batch)


@contextlib.contextmanager
def _rows_to(out: Output, target: Path | None, done: int) -> Iterator[Callable[[str], None]]:
    """A function that writes a row: to stdout, or appended to the target, which must have `done` rows."""
    if target is None:
        yield out.write
        return
    try:
        with target.open("a", encoding="utf-8", newline="\n") as stream, writing_alone(target, target):
            with target.open("rb") as rows:
                if sum(1 for _ in rows) != done:
                    raise SmolError(
                        f"{target}: another process has just written it", "Repeat the command: it continues."
                    )

            def write(row: str) -> None:
                stream.write(row)
                stream.flush()

            yield write
    except OSError as error:
        raise SmolError(
            f"{target}: {error.strerror}", "Correct that and repeat the command: it continues from there."
        ) from None


def _faults(batch: Batch) -> InputError:
    """One error for all lines without answers."""
    found = [(batch.file.lines[index].number, fault) for index, fault in sorted(batch.faults.items())]
    named = "; ".join(f"line {number}: {fault.message}" for number, fault in found[:NAMED_LINES])
    more = f"; and {len(found) - NAMED_LINES} more lines" if len(found) > NAMED_LINES else ""
    count = f"{len(found):,} of {len(batch.file.lines):,} prompts have no answer"
    return InputError(f"{batch.file.name}: {count}: {named}{more}", found[0][1].hint)
