"""Signals that stop a run, after the current step is finished and saved."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from smolctl.errors import ExitCode

# Some of them do not exist on Windows.
EXIT_CODES = {
    signal.Signals[name]: code
    for name, code in {
        "SIGHUP": ExitCode.HUNG_UP,  # the terminal or the ssh connection was closed
        "SIGINT": ExitCode.INTERRUPTED,
        "SIGUSR1": ExitCode.USER_SIGNAL,  # sent by SLURM's --signal=USR1@120 before the time limit
        "SIGTERM": ExitCode.TERMINATED,
    }.items()
    if hasattr(signal, name)
}
# coreutils' `timeout` signals the process and then its group: two signals that count as one.
SECONDS_BETWEEN_TWO = 0.5


class StopFlag:
    """In this context a signal is recorded instead of ending the process; a second one of its kind ends it.

    Only the handler writes `received`, and nothing resets it, so a signal is always noticed by the next step.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the last signal; 0: none
        self._noted: dict[int, float] = {}  # time of the first signal of each kind
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        try:
            for number in EXIT_CODES:
                # Under nohup, a run must survive its terminal.
                if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
                    signal.siginterrupt(number, False)  # so that waiting for a disk or a socket does not fail
        except ValueError:  # only the main thread of a process can handle signals
            self._previous.clear()
        self._mask("SIG_BLOCK")
        return self

    def all_processes_started(self) -> None:
        """Unblock signals, which were blocked because processes started by Lightning inherit that.

        So none of them is killed before it has reached this point itself.
        """
        self._mask("SIG_UNBLOCK")

    def __exit__(self, *_error: object) -> None:
        self._mask("SIG_UNBLOCK")
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _mask(self, how: str) -> None:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(getattr(signal, how), self._previous)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._noted.setdefault(number, now) > SECONDS_BETWEEN_TWO:
            # Lightning would turn KeyboardInterrupt into exit code 1.
            raise SystemExit(EXIT_CODES[signal.Signals(number)])
        self.received = number
