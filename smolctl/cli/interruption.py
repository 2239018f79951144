"""Handles signals that end a command, and raises their exceptions only where they arrive intact."""

from __future__ import annotations

import _thread
import signal
import sys
import time
from contextlib import suppress
from types import FrameType

from smolctl.errors import ExitCode

AGAIN_S = 0.02


class Interruption:
    """A handler that raises KeyboardInterrupt for SIGINT and SystemExit for SIGTERM, but not during imports.

    A library that is interrupted while it is imported may swallow the exception, raise a different one, or
    abort the process; and an exception in a destructor or a callback is printed by Python but ignored. In
    both cases the signal is delivered again a moment later. A second signal during an import is not delayed.
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


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
