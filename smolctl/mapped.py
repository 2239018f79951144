"""Mapped files: an error instead of a death without a word if one is shortened while it is in use."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from smolctl.errors import ExitCode
from smolctl.escaping import for_terminal, json_text

HINT = "Repeat the command with the complete file. Replace a file by renaming a new one to its name."

_sizes: dict[Path, int] = {}  # of the files that this process has mapped
_handlers: list[Any] = []  # kept, because the system calls them


def watch(path: Path) -> None:
    """Prepare for a file that is shortened while it is mapped; called before it is mapped.

    The system ends a process that reads the missing part with SIGBUS. From now on the process then prints an
    error and exits with the code for bad input. A file that is overwritten with the same size is not noticed.
    """
    with suppress(OSError):  # mapping it fails too
        _sizes[path] = path.stat().st_size
    if not _handlers and hasattr(signal, "SIGBUS"):
        import ctypes  # takes time to import

        # A handler of Python's own would never run: Python waits for the end of the instruction that fails.
        _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(_end))
        ctypes.CDLL(None).signal(signal.SIGBUS, _handlers[0])


def _end(_signal: int) -> None:
    shorter = [str(path) for path, size in _sizes.items() if path.exists() and path.stat().st_size < size]
    message = f"{', '.join(shorter) or 'a file in use'}: was shortened while it was in use"
    if "--json" in sys.argv:
        code = int(ExitCode.BAD_INPUT)
        text = json_text({"error": {"code": code, "message": message, "hint": HINT}})
    else:
        text = f"error: {for_terminal(message)}\n hint: {HINT}"
    os.write(2, f"{text}\n".encode("utf-8", "replace"))
    os._exit(ExitCode.BAD_INPUT)
