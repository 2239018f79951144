"""Runs other programs, with a minimal environment and for the duration of a block."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# Variables that a program needs to run: tokens are not passed on.
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
PATIENCE_S = 10.0  # for a program to exit


def bare_environment() -> dict[str, str]:
    """The environment variables of programs."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


@contextmanager
def running_program(
    command: Sequence[str],
    log: IO[str] | int,
    settings: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program during the block; then it is asked to exit, and killed if it does not.

    Args:
        command: the program and its arguments.
        log: receives its output; or `subprocess.DEVNULL`.
        settings: additional environment variables.
        folder: its working folder; None: the current one.
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
