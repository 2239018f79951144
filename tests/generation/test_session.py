"""A session on a terminal: its editor, its commands, its history, and Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from smolctl.errors import PromptTooLongError
from smolctl.generation.complete import CompletionSettings, InterruptedCompletion
from smolctl.generation.conversation import Conversation, Session
from smolctl.generation.load import load_model
from tests.support.interruption import InterruptedAt
from tests.support.tiny_models import SHORT, plain_settings, tiny_model

LIMIT_S = 120  # what a terminal does not show by then will never come
READY = "\x1b[?2004h"  # what the editor writes when it takes keys: from now on pasted text is marked
TAKEN = "\x1b[?2004l"  # what it writes when it has taken a message
PASTE, PASTED = "\x1b[200~", "\x1b[201~"
UP, LEFT, HOME = "\x1b[A", "\x1b[D", "\x01"


class Terminal:
    """The command line in another process, on a terminal of its own."""

    def __init__(self, child: int, screen: int, ready: str) -> None:
        self.child, self.screen, self.ready = child, screen, ready
        self.shown = ""

    def type(self, keys: str) -> None:
        """Press keys when they are waited for."""
        self.read_until(self.ready)
        written = keys.encode()
        while written:  # a terminal takes no more than 4,096 bytes that nobody has read
            written = written[os.write(self.screen, written[:1024]) :]

    def read_until(self, text: str) -> str:
        """What is shown up to a text, from where the last call ended."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self.shown:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self.screen], [], [], left)[0], self.shown
            self.shown += os.read(self.screen, 4096).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before


@contextmanager
def on_a_terminal(
    *arguments: object, term: str = "xterm", ready: str = READY, cache: Path | None = None
) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "smolctl", *map(str, arguments)]
    named = {"SMOLCTL_CACHE": str(cache)} if cache else {}
    child, screen = pty.fork()
    if child == 0:
        os.execve(command[0], command, {**os.environ, "TERM": term, **named})
    try:
        yield Terminal(child, screen, ready)
        with suppress(OSError):  # what a terminal gives when its last process has ended
            while os.read(screen, 4096):
                pass
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        os.close(screen)  # hangs up on what is still there


def messages_of(path: Path) -> list[tuple[str, str]]:
    messages = json.loads(path.read_text())["messages"]
    return [(one["role"], one["content"]) for one in messages if one["role"] != "assistant"]


@pytest.mark.slow
def test_a_session_edits_lines_and_loses_nothing_of_what_is_typed(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    command = ("sample", model, "--max-tokens", "2", "--temperature", "0", "--threads", "1")
    with on_a_terminal(*command, cache=tmp_path) as terminal:
        terminal.type(f"he ct{LEFT}a{HOME}t\r")
        assert "chatting with the model's template" in terminal.shown or terminal.read_until("prefill")
        terminal.type("cat " * 1500 + "\r")  # more than a terminal's own line holds, and than the context
        error = terminal.read_until(" characters, but the model's context of 96 tokens holds")
        assert int(error.rpartition("the prompt has ")[2].replace(",", "")) >= 6000
        terminal.type(f"{PASTE}a\nb\r\nc{PASTED}\r")
        terminal.type("\x03")
        terminal.read_until("Ctrl-D ends.")
        terminal.type("/unknown\r")
        terminal.read_until("There is no command /unknown")
        terminal.type(f"/save {saved}\r")
        terminal.read_until("Saved")
        terminal.type("\x04")
    assert messages_of(saved) == [("user", "the cat"), ("user", "a\nb\nc")]
    with on_a_terminal(*command, cache=tmp_path) as terminal:
        terminal.type(UP * 3 + "\r")  # of the session before
        terminal.type(f"/save {saved}\r")
        terminal.read_until("exists and is not overwritten")
        terminal.type(f"/save {saved}2\r")
        terminal.type("exit\r")
    assert messages_of(tmp_path / "chat.json2") == [("user", "a\nb\nc")]


@pytest.mark.slow
def test_the_commands_of_a_session(model: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("1.json", "2.json", "3.json"))
    with on_a_terminal("sample", model, "--max-tokens", "3", "--threads", "1", cache=tmp_path) as terminal:
        terminal.type("/help\r")
        terminal.read_until("/retry")
        terminal.type("/retry\r")
        terminal.read_until("nothing has been asked")
        terminal.type("/system be kind\r")
        terminal.type("the cat\r")
        terminal.type(f"/save {first}\r")
        terminal.type("/set temperature 5\r")
        terminal.read_until("temperature 5,")
        terminal.type("/set max_tokens 0\r")
        terminal.read_until('"max_tokens" is not an integer')
        terminal.type("/set max_tokens=6\r")
        terminal.type("/retry\r")
        terminal.type(f"/save {second}\r")
        terminal.type("/clear\r")
        terminal.read_until("New conversation.")
        terminal.type(f"/load {first}\r")
        terminal.read_until("after 1 turn")
        terminal.type(f"/load {model / 'config.json'}\r")
        terminal.read_until("not a conversation")
        terminal.type(f"/save {third}\r")
        terminal.type("/exit\r")
    once, again, loaded = (json.loads(path.read_text())["messages"] for path in (first, second, third))
    assert (
        once[:2]
        == again[:2]
        == [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "the cat"},
        ]
    )
    assert loaded == once
    assert len(once) == len(again) == 3
    assert once[2] != again[2]


@pytest.mark.slow
def test_a_paste_whose_end_never_comes_holds_nothing_up(model: Path, tmp_path: Path) -> None:
    with on_a_terminal("sample", model, *SHORT, cache=tmp_path) as terminal:
        terminal.read_until("Ctrl-D ends.")
        terminal.type(f"{PASTE}forgotten\x03")
        terminal.read_until("Ctrl-D ends.")
        terminal.type(f"{PASTE}a\nb")
        time.sleep(1)  # Enter is a part of what is pasted, unless it comes after a pause
        os.write(terminal.screen, b"\r")
        terminal.type(f"/save {tmp_path / 'chat.json'}\r")
        terminal.read_until("Saved")
        terminal.type(f"{PASTE}forgotten")
        os.write(terminal.screen, b"\x04")
    assert messages_of(tmp_path / "chat.json") == [("user", "a\nb")]


@pytest.mark.slow
def test_without_a_template_and_on_a_terminal_that_can_do_nothing(other: Path, tmp_path: Path) -> None:
    """Every prompt stands alone there."""
    with on_a_terminal("sample", other, *SHORT, term="dumb", ready="> ", cache=tmp_path) as terminal:
        assert "each prompt is independent" in terminal.read_until("Ctrl-D ends.")
        answers = []
        for _ in range(2):
            terminal.type("the cat\r")
            answers.append(terminal.read_until("native").split("\n")[-2])
        assert answers[0] == answers[1]
        terminal.type("exit\r")  # not Ctrl-D, which is lost before the editor reads single keys


def test_a_message_that_does_not_fit_leaves_the_history_as_it_is() -> None:
    turns = [{"role": role, "content": "the cat"} for role in ("user", "assistant")] * 2
    session = Session(tiny_model(), CompletionSettings(max_tokens=4), Conversation(True, turns=list(turns)))
    with pytest.raises(PromptTooLongError, match="the model's context holds"):
        session.make_room("the cat " * 50)
    with pytest.raises(PromptTooLongError, match="characters"):
        session.make_room("the cat " * 1_000)
    assert session.conversation.turns == turns
    assert session.make_room("on " * 35) > 0


def test_a_chat_keeps_what_came_before_ctrl_c(interrupted_at: InterruptedAt, model: Path) -> None:
    settings = CompletionSettings(max_tokens=9, sampling=plain_settings(0))
    session = Session(load_model(str(model)), settings, Conversation(True))
    with interrupted_at(5), pytest.raises(InterruptedCompletion) as stopped:
        session.answer("the cat", lambda *_: None)
    answer = stopped.value.result.completions[0].text
    assert answer
    assert session.conversation.turns[1]["content"] == answer
    session.retry(lambda *_: None)
    assert len(session.conversation.turns) == 2
    assert session.conversation.turns[1]["content"].startswith(answer)


@pytest.mark.real_weights
@pytest.mark.parametrize(
    "rounds", [pytest.param(1, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.proof)]
)
def test_ctrl_c_while_a_long_prompt_is_read_leaves_the_next_answer_as_it_was(
    rounds: int, gguf_file: Path, tmp_path: Path
) -> None:
    chance, answers = random.Random(0), []
    with on_a_terminal("sample", gguf_file, "--max-tokens", "9", "--temperature", "0") as terminal:
        for number in range(rounds + 1):
            if number:  # the first answer is undisturbed
                terminal.type(f"{PASTE}{'Tell me about the cat that sat on the mat. ' * 400}{PASTED}\r")
                terminal.read_until(TAKEN)
                time.sleep(0.1 + chance.random() * 3)
                os.write(terminal.screen, b"\x03")
                terminal.read_until("Stopped.")
                terminal.type("/clear\r")
            terminal.type("What is the capital of France?\r")
            terminal.type(f"/save {tmp_path / str(number)}\r")
            terminal.read_until("Saved to")
            answers.append(json.loads((tmp_path / str(number)).read_text())["messages"][1]["content"])
            terminal.type("/clear\r")
        terminal.type("\x04")
    assert "Paris" in answers[0]
    assert answers == [answers[0]] * (rounds + 1)
