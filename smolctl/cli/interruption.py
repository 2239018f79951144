"""Handles signals that end a command, and raises their exceptions only where they arrive intact."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType

from smolctl.errors import ExitCode

AGAIN_S = 0.02
PATIENCE_S = 2.0  # for an interrupted command to end
SHOW_CURSOR = b"\x1b[?25h"  # which a live display hides


class Interruption:
    """A handler that raises KeyboardInterrupt for SIGINT and SystemExit for SIGTERM, but not during imports.

    A library that is interrupted while it is imported may swallow the exception, raise a different one, or
    abort the process; and an exception in a destructor or a callback is printed by Python but ignored. In
    both cases the signal is delivered again a moment later. A second signal during an import is not delayed.

    Python runs a handler between two bytecode steps of the main thread. While that thread is inside one call
    of a library, such as the training of a tokenizer, or waits for a thread that is, nothing is raised. So a
    separate thread ends a command that is still running after `PATIENCE_S`; code that handles a signal with
    its own handler decides itself when to end.
    """

    def __init__(self) -> None:
        self._held_back = False  # a signal arrived during an import
        self._own = False  # the next signal is the one delivered again
        self._main = _thread.get_ident()

    def install(self) -> None:
        """Handle both signals, unless they are ignored."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._raise)
        self._watch()
        report = sys.unraisablehook

        def again(lost: sys.UnraisableHookArgs) -> None:
            error = lost.exc_value
            code = error.code if isinstance(error, SystemExit) else None
            if isinstance(error, KeyboardInterrupt) or code == ExitCode.INTERRUPTED:
                self._deliver_again(signal.SIGINT)
            elif code == ExitCode.TERMINATED:
                self._deliver_again(signal.SIGTERM)
            else:
                report(lost)

        sys.unraisablehook = again

    def _watch(self) -> None:
        """Start the thread that ends a command. Signals reach it at once, through a pipe."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_not_watched)

        def wait() -> None:
            while True:
                for number in os.read(read, 1):
                    if signal.getsignal(number) == self._raise:
                        time.sleep(PATIENCE_S)
                        _end(128 + number)

        _thread.start_new_thread(wait, ())

    def _raise(self, number: int, frame: FrameType | None) -> None:
        is_second = self._held_back and not self._own
        self._own = False
        self._held_back = not is_second and _is_importing(frame)
        if self._held_back:
            self._deliver_again(number)
        elif number == signal.SIGTERM:
            raise SystemExit(ExitCode.TERMINATED)
        else:
            raise KeyboardInterrupt

    def _deliver_again(self, number: int) -> None:
        """Send a signal again. A plain thread takes no lock that the interrupted code may hold."""

        def deliver() -> None:
            time.sleep(AGAIN_S)
            self._own = True
            signal.pthread_kill(self._main, number)

        with suppress(RuntimeError):  # Python is exiting, or there are no more threads
            _thread.start_new_thread(deliver, ())


def _not_watched() -> None:
    """Keep the signals of a forked process out of the pipe of the first one."""
    with suppress(ValueError):  # not in the main thread
        signal.set_wakeup_fd(-1)


def _end(code: int) -> None:
    """End the process without anything that Python does at its end, which may be to wait for a thread."""
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, SHOW_CURSOR)
    os._exit(code)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
