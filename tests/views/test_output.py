"""Where words go, whatever the encoding of the stream."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from smolctl.errors import InputError
from smolctl.views.output import Output, prepare_streams
from smolctl.views.tables import facts

TEXT = "a → b, \u00e9 ± \U0001f600 “q\\”"


class Stream(io.TextIOWrapper):
    def __init__(self, encoding: str, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding, write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def written(self) -> str:
        content = self.buffer
        assert isinstance(content, io.BytesIO)
        return content.getvalue().decode(self.encoding)


@pytest.fixture(params=["ascii", "latin-1", "utf-8"])
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_terminal_shows_a_question_mark_for_what_it_lacks(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(encoding, terminal=True)
    monkeypatch.setattr(sys, "stdout", stream)
    prepare_streams()
    Output().line(TEXT)
    assert stream.written == TEXT.encode(encoding, "replace").decode(encoding) + "\n"


def test_json_is_json_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(encoding, terminal=False)
    monkeypatch.setattr(sys, "stdout", stream)
    prepare_streams()
    out = Output(json=True)
    out.event({"text": TEXT})
    out.document({"text": TEXT})
    first, document = stream.written.split("\n", 1)
    assert json.loads(first) == json.loads(document) == {"text": TEXT}


# Written to do harm: a title, an emptied screen, a link, the clipboard, a moved cursor, the same in one
# byte (C1), a turned direction of writing, a hidden delete.
HOSTILE = (
    "[link=http://evil]x[/link]:smile:\x1b]0;owned\x07\x1b[2J\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\"
    "\x1b]52;c;ZXZpbA==\x07over\rwritten\b\x9b2J\x9d0;owned\x9c\u202eevil\u2069\x7f"
)
STYLE = re.compile(r"\x1b\[[\d;]*m")  # rich's own


def _table(text: str) -> object:
    from rich.table import Table
    from rich.text import Text

    table = Table(text)
    table.add_row(text)
    table.add_row(Text(text, style="bold"))
    return table


PRINTERS: dict[str, Callable[[Output, str], object]] = {
    "text that streams, token by token": lambda out, text: list(map(out.write, text)),
    "a line": lambda out, text: out.line(text),
    "a table": lambda out, text: out.show(_table(text)),  # type: ignore[arg-type]
    "message": lambda out, text: out.message(text),
    "an error": lambda out, text: out.error(InputError(text, text)),
    "what a library prints": lambda out, text: print(text, file=sys.stderr),
    "a log of a library": lambda out, text: logging.getLogger("some.library").error(text),
    "json": lambda out, text: Output(json=True).document({text: text}),
    "an error in json": lambda out, text: Output(json=True).error(InputError(text)),
}


@pytest.fixture(params=PRINTERS)
def printer(request: pytest.FixtureRequest) -> Callable[[Output, str], object]:
    return PRINTERS[request.param]


def printed(printer: Callable[[Output, str], object], terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that is written to both streams."""
    stream = Stream("utf-8", terminal)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr(logging.getLogger("some.library"), "handlers", [logging.lastResort])
    monkeypatch.setattr(logging.getLogger("some.library"), "propagate", False)
    prepare_streams()
    printer(Output(), HOSTILE)
    return stream.written


def test_a_terminal_obeys_nothing_that_is_printed(
    printer: Callable[[Output, str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = STYLE.sub("", printed(printer, True, monkeypatch))
    assert "owned" in written
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", written)
    assert "[link=http://evil]x[/link]" in written  # no markup, and no emoji
    assert ":smile:" in written


def test_a_pipe_gets_what_is_printed_as_it_is(
    printer: Callable[[Output, str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = printed(printer, False, monkeypatch)
    if written.startswith("{"):
        value = json.loads(written)
        assert HOSTILE in value or value["error"]["message"] == HOSTILE.replace("\r", " ")  # in one line
    else:
        assert all(part in written for part in ("\x1b]0;owned", "\x1b[2J", "\x9b2J", "\u202eevil"))


@pytest.mark.parametrize("quiet", [False, True])
def test_libraries_warn_unless_the_user_wants_quiet(
    quiet: bool, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    with Output(quiet=quiet).quieting_libraries():
        warnings.warn("of a library", stacklevel=1)
        logging.getLogger("a library").warning("of another")
        logging.getLogger("a library").error("an error")
    assert len(recwarn) == (0 if quiet else 1)
    assert caplog.messages == [*([] if quiet else ["of another"]), "an error"]
    assert logging.root.manager.disable == 0


@pytest.mark.parametrize("move", ["\r", "\r 10%|##  |", "\n\n", "\x1b[A\x1b[A"])
def test_progress_bars_move_the_cursor_on_stderr(move: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream("utf-8", terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    prepare_streams()
    sys.stderr.write(move)
    assert stream.written == move


def test_a_reader_that_has_seen_enough_is_no_failure_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):  # which `command` ends with exit code 0
        Output().show("a table")


def test_a_closed_stream_is_refused_or_takes_nothing_and_no_file_gets_what_is_printed(tmp_path: Path) -> None:
    command = f"{sys.executable} -m smolctl count-params"
    for line, code, out, err in (
        ("nano --json >&-", 2, "", "stdout is closed"),
        ("nano >&-", 0, "", ""),
        ("nowhere --json 2>&-", 3, "", ""),
        ("nowhere >&- 2>&- <&-", 3, "", ""),
    ):
        done = subprocess.run(f"{command} {line}", shell=True, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, out), line
        assert err in done.stderr
        assert bool(err) == bool(done.stderr)
    opened = (
        "from smolctl.views.output import prepare_streams; prepare_streams(); print(open('x', 'w').fileno())"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.close(0); os.close(2); {opened}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert int(done.stdout) > 2


def test_a_table_in_a_file_has_no_blanks_at_the_ends_of_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Output().show(facts([("a", "short"), ("b", "much longer")]), "a line")
    assert capsys.readouterr().out == "a  short\nb  much longer\na line\n"
