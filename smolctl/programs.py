"""Other programs, which see of this machine only what they need, and end with the block that needs them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# Of this machine's environment only what a program needs to run: no token reaches it.
PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TEMP",
    "SYSTEMROOT",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
)
PATIENCE_S = 10.0  # for a program that was asked to end


def bare_environment() -> dict[str, str]:
    """The variables that programs get."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


@contextmanager
def running_program(
    command: Sequence[str],
    log: IO[str] | int,
    settings: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A program while the block runs; then it is asked to end, and killed where it does not.

    Args:
        command: the program and its arguments.
        log: gets all that it prints; `subprocess.DEVNULL`: nobody.
        settings: variables beside those that every program gets.
        folder: where it works; None: here.
    """
    environment = bare_environment() | dict(settings or {})
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
