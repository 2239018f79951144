"""Renders untrusted Jinja templates with limits on time, memory and the length of their text.

A template is a program. Jinja's sandbox prevents access to the interpreter, but not endless loops or
excessive memory: `{{ 10 ** (10 ** 8) }}` is a single operation. So it is rendered in a separate process,
which the operating system limits.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVarTuple

import jinja2

from smolctl.worker import Worker, WorkerEndedError

A = TypeVarTuple("A")

MOST_CPU_S = 2  # seconds of CPU time per text; real templates take 0.01
MOST_MB = 512  # of memory, in addition to Python and Jinja
MOST_CHARACTERS = 10_000_000  # per text, if the context does not limit it further
MOST_SAID = 300  # characters of a template's own error message


def filled(
    compiled: Callable[[], jinja2.Template], variables: Mapping[str, Any], most: int
) -> tuple[str, str]:
    """The text of a template; and the error, as in "the template {fault}". One of the two is empty.

    Args:
        compiled: returns the compiled template.
        variables: for the template.
        most: maximum characters; a longer text is rendered only up to one character more.
    """
    pieces, length = [], 0
    try:
        for piece in compiled().generate(variables):
            pieces.append(piece)
            length += len(piece)
            if length > most:
                break
        return "".join(pieces)[: most + 1], ""
    except jinja2.TemplateSyntaxError as error:
        return "", f"is broken at line {error.lineno}: {_said(error)}"
    except SyntaxError as error:  # in the Python code that Jinja generates, which has other line numbers
        return "", f"is broken: {error.msg}"
    except MemoryError:
        return "", f"needs more than {MOST_MB} MB of memory, or is nested too deeply"
    except Exception as error:  # whatever a template raises is the template's fault
        return "", f"fails{_place(error)}: {_said(error)}"


def with_limits(fill: Callable[[*A], tuple[str, str]], *asked: *A) -> tuple[str, str]:
    """Call a function that renders templates with `filled`, in the process for templates.

    Args:
        fill: at the top level of a module.
        asked: its arguments, which must be picklable.
    """
    return _PROCESS.run(fill, *asked)


def _limited(fill: Callable[[*A], tuple[str, str]], *asked: *A) -> tuple[str, str]:
    """Call a function in a process that the operating system ends if it takes too long.

    Windows has no such limits, and macOS has none for memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the calling process
    with contextlib.suppress(ImportError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + MOST_CPU_S)
        _limit(resource.RLIMIT_CORE, 0)
        with contextlib.suppress(OSError):  # no /proc, and on macOS no such limit
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + (MOST_MB << 20))
    return fill(*asked)


def _limit(kind: int, most: int) -> None:
    import resource

    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


class _Process:
    """The process for templates. It is started when first needed, and again after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None

    def run(self, fill: Callable[[*A], tuple[str, str]], *asked: *A) -> tuple[str, str]:
        """See `with_limits`."""
        with self._lock:
            if self._worker is None or not self._worker.running:
                self._worker = Worker("the template")
            done, text, fault = False, "", ""
            try:
                text, fault = self._worker.call(_limited, fill, *asked)
                done = not fault
            except WorkerEndedError as error:
                too_long = error.code == -getattr(signal, "SIGXCPU", 0)
                fault = (
                    f"takes more than {MOST_CPU_S} s" if too_long else f"cannot be filled ({error.message})"
                )
            finally:
                # After Ctrl-C, the worker's late result would be taken for that of the next text. After its
                # compiler ran out of memory, Python was sometimes damaged.
                if not done:
                    self.end()
            return text, fault

    def end(self) -> None:
        """End the process, if there is one."""
        if self._worker is not None:
            self._worker.__exit__()
            self._worker = None


_PROCESS = _Process()
atexit.register(_PROCESS.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PROCESS.__init__)  # type: ignore[misc]


def _said(error: Exception) -> str:
    """An error's message on one short line; messages of Jinja's own errors need no class name."""
    said = " ".join(str(error)[:MOST_SAID].split())
    return said if said and isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {said}"


def _place(error: Exception) -> str:
    """The template's line that raised an error; Jinja sets the line numbers of a template's frames."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return f" at line {lines[-1]}" if lines else ""
