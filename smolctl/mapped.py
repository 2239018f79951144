"""Mapped files: an error instead of a death without a word if one is shortened while it is in use."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from smolctl.errors import InputError

HINT = "Repeat the command with the complete file. Replace a file by renaming a new one to its name."

_sizes: dict[Path, int] = {}  # of the files that this process has mapped
_reports: list[Callable[[InputError], None]] = []  # the last one is called; without one, nothing is handled
_handlers: list[Any] = []  # kept, because the system calls them


def exit_if_shortened(report: Callable[[InputError], None]) -> None:
    """From now on, report a file that was shortened while it is mapped, and exit with the error's code.

    The system would end a process that reads the missing part with SIGBUS. This is for programs: a library
    must not end its process. A file that is overwritten with the same size is not noticed.
    """
    _reports[:] = [report]


def watch(path: Path) -> None:
    """Note the size of a file before it is mapped."""
    with suppress(OSError):  # mapping it fails too
        _sizes[path] = path.stat().st_size
    if _reports and not _handlers and hasattr(signal, "SIGBUS"):
        import ctypes  # takes time to import

        # A handler of Python's own would never run: Python waits for the end of the instruction that fails.
        _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(_end))
        ctypes.CDLL(None).signal(signal.SIGBUS, _handlers[0])


def _end(_signal: int) -> None:
    shorter = [str(path) for path, size in _sizes.items() if path.exists() and path.stat().st_size < size]
    error = InputError(f"{', '.join(shorter) or 'a file in use'}: was shortened while it was in use", HINT)
    _reports[0](error)
    sys.stderr.flush()
    os._exit(error.exit_code)
