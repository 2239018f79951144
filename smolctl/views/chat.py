"""A session on a terminal: commands, and answers as they stream."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolctl.durable import named_path
from smolctl.errors import InputError, SmolError
from smolctl.generation.complete import CompletionResult, InterruptedCompletion, TextListener
from smolctl.generation.conversation import Session
from smolctl.generation.prompts import COUNTS, SAMPLING, SETTINGS
from smolctl.outside import json_or_text
from smolctl.views.completions import StreamView, show_facts
from smolctl.views.editor import open_editor
from smolctl.views.numbers import counted
from smolctl.views.output import Output

HELP = """\
/clear              begin a new conversation
/system [TEXT]      show the system message, or set it; "none" removes it
/set [NAME VALUE]   show the settings, or change one: /set temperature 0.2
/retry              answer the last question once more
/save FILE          write the conversation to a file
/load FILE          continue a conversation that was saved
/exit               end; so do exit and Ctrl-D
Ctrl-C stops an answer and keeps what came of it. Pasted lines are one message. A space before the first
character makes a message of what would be a command."""


class Chat:
    """Answers the user's input until it ends."""

    def __init__(self, out: Output, session: Session) -> None:
        self.out, self.session = out, session
        self._files: set[Path] = set()  # written or read by this session, and therefore replaceable
        self._commands: dict[str, Callable[[str], object]] = {
            "/help": lambda _: out.message(HELP),
            "/clear": self._clear,
            "/reset": self._clear,
            "/system": self._system,
            "/set": self._set,
            "/retry": lambda _: self._answer(session.retry),
            "/save": self._save,
            "/load": self._load,
        }

    def run(self) -> None:
        """Read and answer until Ctrl-D or /exit."""
        chats = self.session.conversation.chat
        mode = "chatting with the model's template" if chats else "each prompt is independent"
        self.out.message(f"{self.session.model.id}: {mode}. /help lists the commands, Ctrl-D ends.")
        with _own_interrupts():
            self._answer_all(open_editor())

    def _answer_all(self, read: Callable[[], str]) -> None:
        while True:
            try:
                text = read()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.out.message("Ctrl-D ends.")
                continue
            if text.rstrip() in ("exit", "quit") or re.match(r"/(exit|quit)(\s|$)", text):
                return
            try:
                if text.strip():
                    self._obey(text)
            except KeyboardInterrupt:  # before the first token, or between an answer and the next prompt
                self.out.message("Stopped.")

    def _obey(self, text: str) -> None:
        """Run a command or answer a message; an error ends only this turn."""
        name, _, argument = text.strip().partition(" ")
        try:
            if not re.match(r"/[a-z]+(\s|$)", text):
                self._ask(text)
            elif name in self._commands:
                self._commands[name](argument.strip())
            else:
                self.out.message(
                    f"There is no command {name}. /help lists them; a space before it makes it a message."
                )
        except SmolError as error:
            self.out.error(error)

    def _ask(self, text: str) -> None:
        if forgotten := self.session.make_room(text):
            turns = "turn was" if forgotten == 1 else f"{forgotten} turns were"
            capacity = self.session.capacity
            self.out.message(f"The context of {capacity:,} tokens is full: the oldest {turns} dropped.")
        self._answer(lambda on_text: self.session.answer(text, on_text))

    def _answer(self, answer: Callable[[TextListener], CompletionResult]) -> None:
        settings = self.session.settings
        view, stopped = StreamView(self.out, settings.samples), False
        try:
            result = answer(view)
        except InterruptedCompletion as interrupted:
            result, stopped = interrupted.result, True
        view.close()
        show_facts(self.out, self.session.model, result, settings.max_tokens)
        if stopped:
            self.out.message("Stopped.")

    def _clear(self, _: str) -> None:
        self.session.conversation.turns = []
        self.out.message("New conversation.")

    def _system(self, text: str) -> None:
        conversation = self.session.conversation
        if not conversation.chat:
            raise InputError(
                f"{self.session.model.id}: a model without a chat template has no system message"
            )
        if text:
            conversation.system = None if text == "none" else text
        self.out.message(f"System message: {conversation.system or 'none'}")

    def _set(self, text: str) -> None:
        if text:
            name, _, value = text.replace("=", " ", 1).partition(" ")
            if name not in SETTINGS:
                raise InputError(f"there is no setting {name}", f"There are {', '.join(SETTINGS)}.")
            self.session.change({name: json_or_text(value.strip())})
        settings = self.session.settings
        values: dict[str, Any] = {name: getattr(settings.sampling, name) for name in SAMPLING}
        values |= {name: getattr(settings, field) for name, (field, *_) in COUNTS.items()}
        del values["max_completion_tokens"]  # another name of max_tokens
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        self.out.message(f"{shown}, stop {list(settings.stop)}")

    def _save(self, name: str) -> None:
        path = _file(name)
        if path.exists() and path not in self._files:
            raise InputError(f"{path} already exists and is not overwritten", "Name another file.")
        try:
            self.session.conversation.save(path)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}", "Name a file that can be written.") from None
        self._files.add(path)
        self.out.message(f"Saved to {path}.")

    def _load(self, name: str) -> None:
        path = _file(name)
        self.session.load(path)
        self._files.add(path)
        turns = len(self.session.conversation.turns) // 2
        self.out.message(f"The conversation of {path} continues after {counted(turns, 'turn')}.")


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Inside this context Ctrl-C raises as before, but ends nothing else than the chat decides."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: before(number, frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _file(name: str) -> Path:
    if not name:
        raise InputError("no file is named", "Name one, as in /save chat.json.")
    return named_path(name)
