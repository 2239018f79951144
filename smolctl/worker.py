"""A separate process that runs functions, one at a time.

Every engine of `bench` has one. Its peak memory can then be measured separately, its threads do not disturb
other engines while it waits, a closed file can be loaded cold, and a crash of the engine affects nothing
else. Chat templates also run in one, because it can be killed at any time.

Requests are sent to its standard input and results to its standard output, both as pickles.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO, Self, TypeVar, TypeVarTuple

from smolctl.cores import sharing_cores
from smolctl.errors import SmolError

A = TypeVarTuple("A")
T = TypeVar("T")
START = "from smolctl.worker import main; main()"


class WorkerEndedError(SmolError):
    """The process ended before it returned a result.

    Args:
        message: its last output.
        code: its exit code; -N if signal N ended it.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Worker:
    """The process, for its caller.

    Args:
        name: of its engine, for messages.
        threads: of the engine and the tokenizer in it; 0: it computes nothing, and starts in 0.1 s.
    """

    def __init__(self, name: str, threads: int = 0) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            # -P: modules in the working folder must not replace a library's modules.
            [sys.executable, "-P", "-c", START, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "OMP_NUM_THREADS": str(max(1, threads)),
                "RAYON_NUM_THREADS": str(max(1, threads)),
            },
        )
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def call(self, function: Callable[[*A], T], *arguments: *A) -> T:
        """Call a function in the process and return its result.

        Args:
            function: at the top level of an importable module.
            arguments: must be picklable, like the result.

        Raises:
            SmolError: the function failed; with the reason.
            WorkerEndedError: the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((function, arguments), self._process.stdin)
            self._process.stdin.flush()
            result, error = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            message = f"{self.name}: its process ended ({self._last_words()})"
            raise WorkerEndedError(message, self._process.wait()) from None
        if error:
            raise SmolError(f"{self.name}: {error}")
        found: T = result
        return found

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"exit code {code}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Kill the process: it has nothing to save."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Run requested functions until the other end closes; reply with (result, "") or (None, error)."""
    while True:
        try:
            function, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = function(*arguments), ""
        except SmolError as error:
            answer = None, error.message
        except Exception as error:  # whatever a peer raises is a reason to leave it out
            answer = None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        pickle.dump(answer, answers)
        answers.flush()


def main() -> None:
    """Serve on stdin and stdout; output of libraries goes to stderr."""
    answers, threads = os.fdopen(os.dup(1), "wb"), int(sys.argv[1])
    os.dup2(2, 1)
    if not threads:
        serve(sys.stdin.buffer, answers)
        return
    import torch

    torch.set_num_threads(threads)
    with sharing_cores():
        serve(sys.stdin.buffer, answers)
