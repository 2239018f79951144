"""Output of commands: results to stdout and messages to stderr, as tables, plain lines or JSON."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from smolctl.errors import SmolError
from smolctl.escaping import for_terminal, json_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# A pipe has no width. Tables for a pipe have this many columns.
PIPE_WIDTH = 120
PADDING = re.compile(r" +$", re.MULTILINE)
# Cursor movements of tqdm, which draws the progress bars of the Hub's client: to the beginning of the line
# before a bar, and by whole lines between bars.
BAR_MOVES = re.compile(r"\r?(?=[^\r\x1b]*\Z)|(?:\n|\x1b\[A)*\Z")


class WrappedStream:
    """A standard stream with a different `write`.

    Args:
        stream: the original one.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class TerminalStream(WrappedStream):
    """A standard stream connected to a terminal, which shows control characters instead of sending them.

    Much of the output comes from models, files and Hubs, some of it through warnings of libraries.

    Args:
        stream: the terminal's.
        bars: whether progress bars may move the cursor.
    """

    def __init__(self, stream: TextIO, bars: bool = False) -> None:
        super().__init__(stream)
        self.rich_proxied_file = stream  # the name by which rich finds the stream for its own sequences
        self._bars = bars

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        moves = BAR_MOVES.match(text) if self._bars else None
        start = moves.end() if moves else 0
        super().write(text[:start] + for_terminal(text[start:]))
        return len(text)


class MessageStream(WrappedStream):
    """Stderr where it is not a terminal. A message that cannot be written, as on a full disk, and those after
    it are dropped, because results must not be lost with them. A closed pipe still ends the command.
    """

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        with self._dropping():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered."""
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError:
            _abandon(self._stream)


class StdoutError(SmolError):
    """Stdout cannot be written, as on a full disk; nothing more is written to it."""


@dataclass(frozen=True)
class Output:
    """The output of one command.

    Args:
        json: print only machine-readable documents on stdout.
        quiet: print only results and errors.
        verbose: print more; repeatable.
    """

    json: bool = False
    quiet: bool = False
    verbose: int = 0

    @cached_property
    def stdout(self) -> Console:
        return _console(stderr=False)

    @cached_property
    def stderr(self) -> Console:
        return _console(stderr=True)

    def show(self, *renderables: RenderableType) -> None:
        """Print a result for people; nothing with `--json`."""
        if not self.json:
            with self._or_on_stderr(lambda: self.stderr.print(*renderables, sep="\n")):
                if self.stdout.is_terminal:
                    self.stdout.print(*renderables, sep="\n")
                else:  # a file or a pipe, in which rich's padding would only be in the way
                    with self.stdout.capture() as captured:
                        self.stdout.print(*renderables, sep="\n")
                    self.stdout.file.write(PADDING.sub("", captured.get()))
                    self.stdout.file.flush()

    def line(self, text: str) -> None:
        """Print one line of a result unchanged, however long; nothing with `--json`."""
        if not self.json:
            self.stdout.print(text, highlight=False, soft_wrap=True)

    def write(self, text: str) -> None:
        """Write a result to stdout unchanged and immediately."""
        with self._or_on_stderr(lambda: sys.stderr.write(text if text.endswith("\n") else text + "\n")):
            sys.stdout.write(text)
            sys.stdout.flush()

    @contextlib.contextmanager
    def _or_on_stderr(self, write: Callable[[], object]) -> Iterator[None]:
        """Write results to stderr if stdout fails, so that no computed result is lost.

        Raises:
            StdoutError: the failure is not a closed pipe.
        """
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            abandon_stdout()
            write()
            raise StdoutError(
                f"stdout cannot be written ({error.strerror})",
                "The part that was not written is above this line.",
            ) from None

    @contextlib.contextmanager
    def quieting_libraries(self) -> Iterator[None]:
        """With `--quiet`, suppress warnings and logs of libraries on stderr, except errors. Show the Hub
        client's progress bars only on a terminal; the client reads that setting from the environment when
        it is imported.
        """
        if self.json or self.quiet or not self.stderr.is_terminal:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if not self.quiet:
            yield
            return
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            logging.disable(disabled)

    def document(self, value: Mapping[str, Any]) -> None:
        """Print one JSON document; nothing without `--json`."""
        if self.json:
            self.write(json_text(value, indent=2) + "\n")

    def event(self, value: Mapping[str, Any]) -> None:
        """Print one JSON line of a stream; nothing without `--json`."""
        if self.json:
            self.write(json_text(value) + "\n")

    def message(self, text: str) -> None:
        """Print a message in addition to the results; nothing with `--quiet`."""
        if not self.quiet:
            self.stderr.print(text, highlight=False, soft_wrap=True)

    def error(self, error: SmolError) -> None:
        """Print an error as one line of cause and one of remedy, or as a JSON object of both."""
        if self.json:
            body = {"code": int(error.exit_code), "message": error.message, "hint": error.hint}
            print(json_text({"error": body}), file=sys.stderr, flush=True)
            return
        self.stderr.print("error: ", style="bold red", end="", highlight=False)
        self.stderr.print(" ".join(error.message.splitlines()), highlight=False, soft_wrap=True)
        if error.hint:
            self.stderr.print(f" hint: {error.hint}", highlight=False, soft_wrap=True)


def fields(result: object, without: Container[str]) -> dict[str, Any]:
    """The fields of a frozen result as a JSON object, except some."""
    return {name: value for name, value in vars(result).items() if name not in without}


def abandon_stdout() -> None:
    """Discard stdout's buffer and further output: it failed, and would fail again at exit."""
    _abandon(sys.stdout)


def _abandon(stream: TextIO) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not a file, in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def prepare_streams() -> None:
    """Make the standard streams replace characters that their encodings lack instead of failing, and protect
    terminals from control characters in the output. Closed ones become /dev/null.

    Stdout and stderr write missing characters as "?" on a terminal, which keeps columns aligned, and
    otherwise as JSON escapes, which lose nothing. Stdin reads invalid bytes as replacement characters.
    """

    def escape(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        return json.dumps(error.object[error.start : error.end])[1:-1], error.end  # noqa: TID251 - ASCII

    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: a file would get its number next, and what libraries print would go into it
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:  # otherwise `print` would write errors to stdout
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    codecs.register_error("json", escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Python queries a file's position, which a pipe that replaced its descriptor does not have.
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="replace" if stream.isatty() else "json")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty():
        sys.stdout = cast(TextIO, TerminalStream(sys.stdout))
    if isinstance(sys.stderr, io.TextIOWrapper):
        stream = TerminalStream(sys.stderr, bars=True) if sys.stderr.isatty() else MessageStream(sys.stderr)
        sys.stderr = cast(TextIO, stream)


def _console(stderr: bool) -> Console:
    from smolctl.views.console import PlainConsole

    console = PlainConsole(stderr=stderr)
    return console if console.is_terminal else PlainConsole(stderr=stderr, width=PIPE_WIDTH)
