"""The process of a contender, seen from the one that asks.

Each contender has a process of its own. Its peak memory is then its own, its threads disturb nobody while
it waits, a file that it has closed can be loaded cold, and an engine that crashes takes nothing with it.
The processes take turns: only one works at a time.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

from smolctl.benchmark.contenders import Contender
from smolctl.benchmark.work import Facts, Job, Measured
from smolctl.errors import SmolError


class Worker:
    """The process of a contender, seen from the one that asks."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "smolctl.benchmark.worker", str(contender.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "RAYON_NUM_THREADS": str(contender.threads)},  # of the tokenizer
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def prepare(self, job: Job) -> Facts:
        """Load what a job needs.

        Raises:
            SmolError: the contender cannot do it, with its reason.
        """
        found = self._ask("prepare", job)
        assert isinstance(found, Facts)
        return found

    def run(self, job: Job) -> Measured:
        """Do a job once."""
        found = self._ask("run", job)
        assert isinstance(found, Measured)
        return found

    def _ask(self, what: str, job: Job) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((what, job), self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise SmolError(f"{job.contender.engine}: its process ended ({self._last_words()})") from None
        if isinstance(answer, str):
            raise SmolError(f"{job.contender.engine} {job.kind}: {answer}")
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"exit code {code}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process: the closed pipe tells it to; after an error nobody waits for its work."""
        if kind is not None:
            self._process.kill()
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
