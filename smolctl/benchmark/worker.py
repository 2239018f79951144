"""`python -m smolctl.benchmark.worker THREADS`: what runs in the process of a contender.

Requests come as pickles on stdin and are answered on stdout: (what, job), see `process.py`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch

from smolctl.benchmark.contenders import Contender, open_engine
from smolctl.benchmark.file_work import checkpoint, load, tokenize
from smolctl.benchmark.train_work import training_step
from smolctl.benchmark.work import Facts, Job, Measured, Work, decode, prefill
from smolctl.errors import SmolError
from smolctl.generation.engine import Engine
from smolctl.timing import peak_memory

ENGINE_WORK: dict[str, Callable[[Engine, Job], Work]] = {
    "prefill": prefill,
    "decode": decode,
    "batch": decode,
}
OTHER_WORK: dict[str, Callable[[Job], Work]] = {
    "load": load,
    "train": training_step,
    "tokenize": tokenize,
    "checkpoint": checkpoint,
}
RESET_PEAK = "5"  # what proc(5) wants in clear_refs for a new VmHWM


def reset_peak() -> None:
    """Let the peak of this process begin anew; where the system cannot, it stays that of all so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)


class _Desk:
    """What the contender's process keeps between requests."""

    def __init__(self) -> None:
        self.works: dict[Job, Work] = {}
        self.engines: dict[Contender, Engine] = {}

    def prepare(self, job: Job) -> Facts:
        if job.kind not in ENGINE_WORK:
            self.works[job] = OTHER_WORK[job.kind](job)
            return told_by(open_engine(job.contender)) if job.kind == "load" else Facts()
        if job.contender not in self.engines:
            self.engines[job.contender] = open_engine(job.contender)
        engine = self.engines[job.contender]
        self.works[job] = ENGINE_WORK[job.kind](engine, job)
        return told_by(engine)

    def run(self, job: Job) -> Measured:
        reset_peak()
        lap = self.works[job]()
        return Measured(lap, peak_memory(torch.device("cpu")))


def told_by(engine: Engine) -> Facts:
    """What an engine says of itself."""
    return Facts(engine.name, engine.precision, engine.weight_bytes)


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until the other end closes; an error is answered with its text."""
    desk = _Desk()
    while True:
        try:
            what, job = pickle.load(requests)
        except EOFError:
            return
        answer: Facts | Measured | str
        try:
            answer = desk.prepare(job) if what == "prepare" else desk.run(job)
        except SmolError as error:
            answer = error.message
        except Exception as error:  # whatever a peer raises is a reason to leave it out
            answer = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        pickle.dump(answer, answers)
        answers.flush()


def main() -> None:
    """Serve on stdin and stdout; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(int(sys.argv[1]))
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
