"""What `smolctl sample` does with a model besides continuing one prompt: a session, or many prompts."""

from __future__ import annotations

import sys
from pathlib import Path

from smolctl.errors import InputError, UsageError
from smolctl.generation.complete import CompletionSettings
from smolctl.generation.conversation import Conversation, Session
from smolctl.generation.load import LoadedModel
from smolctl.generation.many import Request, complete_many, read_requests, tokenize_requests
from smolctl.views.many import ManyView
from smolctl.views.output import Output
from smolctl.views.samples import StreamView, show_explanation, timing_line

HELP = "/reset forgets what was said, /help shows this, Ctrl-C stops an answer, Ctrl-D ends."


def converse(out: Output, model: LoadedModel, settings: CompletionSettings, talks: Conversation) -> None:
    """Ask for prompts until the input ends. A chat goes on; without one every prompt stands alone."""
    session = Session(model, settings, talks)
    manner = "chatting by the model's template" if talks.chat else "every prompt is continued by itself"
    out.talk(f"{model.id}: {manner}. {HELP}")
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
        if text.strip() == "/help":
            out.talk(HELP)
        elif text.strip() == "/reset":
            session.reset()
            out.talk("Forgotten.")
        elif text.strip():
            _answer(out, session, text)


def _answer(out: Output, session: Session, text: str) -> None:
    """One turn of a session; its errors and Ctrl-C end the turn only."""
    view = StreamView(out, session.settings.samples)
    try:
        if forgotten := session.make_room(text):
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            out.talk(f"The context of {session.capacity:,} tokens is full: the oldest {turns} forgotten.")
        result = session.answer(text, view)
    except InputError as error:
        out.error(error)
        return
    except KeyboardInterrupt:
        view.close()
        out.talk("Stopped.")
        return
    view.close()
    if session.settings.alternatives:
        show_explanation(out, session.model, result)
    out.talk(timing_line(session.model, result.timing))


def read_jsonl(name: str) -> list[Request]:
    """The requests of a file, '-' for stdin.

    Raises:
        InputError: it cannot be read, or lines of it are no requests.
    """
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{name}: {reason}", "Name a file of JSON lines, or '-' for stdin.") from None
    return read_requests(text.split("\n"), "stdin" if name == "-" else name)


def complete_jsonl(
    out: Output,
    model: LoadedModel,
    requests: list[Request],
    settings: CompletionSettings,
    talks: Conversation,
    name: str,
    batch_size: int,
) -> None:
    """Continue every request and print one JSON object for each, in order; Ctrl-C keeps what is done."""

    def render(request: Request) -> str:
        if request.messages is not None:
            return talks.render(model, request.messages)
        return talks.prompt(model, request.text or "")

    prompts = tokenize_requests(model, requests, render, name, settings)
    view = ManyView(out, [request.fields for request in requests])
    try:
        for index, completions in complete_many(model, prompts, settings, batch_size):
            view(index, completions)
    finally:
        view.close()


def check_usage(models: list[str], compare: bool, jsonl: str | None, prompt: str | None) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: naming them.
    """
    if compare and len(models) < 2:
        raise UsageError("--compare needs two MODELs or more", "Name them one after the other.")
    if jsonl is not None and prompt is not None:
        raise UsageError("--jsonl and --prompt exclude each other", "Write the prompt into the file.")
    if jsonl is not None and len(models) > 1:
        raise UsageError("--jsonl takes one MODEL", "Run it once for every model.")
