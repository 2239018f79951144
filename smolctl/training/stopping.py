"""Signals that stop a run: the step at hand is finished and saved first."""

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
        "SIGHUP": ExitCode.HUNG_UP,  # the terminal or the ssh connection is gone
        "SIGINT": ExitCode.INTERRUPTED,
        "SIGUSR1": ExitCode.USER_SIGNAL,  # what SLURM's --signal=USR1@120 sends before the time is up
        "SIGTERM": ExitCode.TERMINATED,
    }.items()
    if hasattr(signal, name)
}
# `timeout` of coreutils signals the process and then its group: two signals that mean one.
SECONDS_BETWEEN_TWO = 0.5


class StopFlag:
    """Inside this context a signal is noted instead of ending the process; a second one of its kind ends it.

    Only the handler writes `received`, and nothing takes it back: a signal is seen at the next step at the
    latest, whenever it arrives.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the signal that came last; 0: none came
        self._noted: dict[int, float] = {}  # when each kind came first
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        try:
            for number in EXIT_CODES:
                # Under nohup a run shall outlive its terminal.
                if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
                    signal.siginterrupt(number, False)  # nothing that waits for a disk or a socket fails
        except ValueError:  # only the main thread of a process can take signals
            self._previous.clear()
        self._mask("SIG_BLOCK")
        return self

    def all_processes_started(self) -> None:
        """Let signals through, which wait until now: processes that Lightning starts inherit that they wait.

        So none of them is killed before it has come here itself.
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
