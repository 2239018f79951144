"""A terminal to run commands in, and what its user sees."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios

from tests.support.processes import start

CONTROL = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])|(\x1b.|.)", re.DOTALL)
SECOND_SCREEN = "1049"


class Terminal:
    """As much of a terminal as smolctl uses: text, moves of the cursor, erasing, a second screen."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.second: list[str] = []  # every frame of the second screen
        self._scrolled: list[list[str]] = []
        self._rows = self._blank()
        self._row = self._column = 0
        self._first: tuple[list[list[str]], int, int] | None = None  # put aside for the second screen

    @property
    def text(self) -> str:
        """All that can be seen by scrolling."""
        return _joined(self._scrolled + self._rows)

    def feed(self, text: str) -> None:
        """Take what a program writes."""
        for private, numbers, final, character in CONTROL.findall(text):
            if character == "\n":
                self._new_line()
            elif character == "\r":
                self._column = 0
            elif character:
                self._write(character)
            elif private:
                if numbers == SECOND_SCREEN:
                    self._switch(final == "h")
            else:
                self._move(final, int(numbers.split(";")[0] or 1) if final != "m" else 0)

    def _write(self, character: str) -> None:
        if self._column == self.width:
            self._new_line()
        self._rows[self._row][self._column] = character
        self._column += 1

    def _new_line(self) -> None:
        self._row, self._column = self._row + 1, 0
        if self._row == self.height:
            if self._first is None:
                self._scrolled.append(self._rows[0])
            self._rows = [*self._rows[1:], [" "] * self.width]
            self._row -= 1

    def _move(self, final: str, count: int) -> None:
        if final == "A":
            self._row = max(0, self._row - count)
        elif final == "K":
            self._rows[self._row] = [" "] * self.width
        elif final == "H":
            if self._first is not None:
                self.second.append(_joined(self._rows))
            self._row = self._column = 0

    def _switch(self, on: bool) -> None:
        if on:
            self._first = self._rows, self._row, self._column
            self._rows, self._row, self._column = self._blank(), 0, 0
        elif self._first is not None:
            self.second.append(_joined(self._rows))
            (self._rows, self._row, self._column), self._first = self._first, None

    def _blank(self) -> list[list[str]]:
        return [[" "] * self.width for _ in range(self.height)]


def _joined(rows: list[list[str]]) -> str:
    return "\n".join("".join(row).rstrip() for row in rows).rstrip()


def run_in_terminal(*arguments: object, width: int = 80, height: int = 24) -> tuple[int, Terminal]:
    """`smolctl ARGUMENTS` in a terminal of its own: its exit code, and the terminal."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment["TERM"] = "xterm-256color"
    process = start(*arguments, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    written = b""
    try:
        while part := os.read(leader, 65_536):
            written += part
    except OSError:  # on Linux the end of a terminal is an error
        pass
    finally:
        os.close(leader)
        code = process.wait()
    terminal = Terminal(width, height)
    terminal.feed(written.decode())
    return code, terminal
