"""Trains a tiny run, kills it without warning again and again, resumes it each time until it is done.

    python -m tests.support.kill_at_random RUNS SEED

Prints one JSON object a run: how often it was killed, and how often while a checkpoint was being written.
Everything is imported once and each attempt is a fork, so that an attempt takes a second and not ten.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from smolctl.runs.folder import RunFolder
from smolctl.training.resume import ResumeOptions, resume
from smolctl.training.train import train
from tests.support.tiny_runs import prepare_tiny

STEPS = 12
EVERY_STEP: dict[str, Any] = {
    "checkpoint": {"every": 1},
    "train": {"steps": STEPS},
    "validation": {"every": 0},
}


def start(out: Path) -> None:
    train(prepare_tiny(Path("corpus"), **EVERY_STEP), "tiny", out, True, lambda _event: None)


def go_on(out: Path) -> None:
    resume(out, ResumeOptions(), lambda _event: None)


def fork(function: Callable[[Path], None], out: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            function(out)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def partial_exists(out: Path) -> bool:
    return any(out.glob("checkpoints/.*.partial"))


def is_finished(out: Path) -> bool:
    files = RunFolder(out).checkpoints()
    return bool(files) and files[-1].step == STEPS


def kill_at_some_moment(child: int, out: Path, chance: random.Random) -> tuple[bool, bool]:
    """Whether the child was killed before it ended by itself, and while it wrote a checkpoint."""
    in_a_write = chance.random() < 0.5
    deadline = time.monotonic() + chance.uniform(0.05, 1.0)
    armed = chance.randrange(STEPS)  # checkpoints to let pass before a write is interrupted
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, "a run that was not killed failed"
            return False, False
        writing = partial_exists(out)
        late = time.monotonic() > deadline
        ready = writing and len(RunFolder(out).checkpoints()) > armed if in_a_write else late
        if ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True, partial_exists(out)


def main() -> None:
    runs, seed = int(sys.argv[1]), int(sys.argv[2])
    for number in range(runs):
        chance = random.Random(seed + number)
        out = Path(f"killed-{number}")
        kills = writes = 0
        killed = True
        while killed and not is_finished(out):  # a kill may come after the last checkpoint
            begun = RunFolder.is_run(out) and RunFolder(out).checkpoints()
            child = fork(go_on if begun else start, out)
            if kills < 4:
                killed, written = kill_at_some_moment(child, out, chance)
                kills, writes = kills + killed, writes + written
            else:
                _, status = os.waitpid(child, 0)
                assert status == 0
                killed = False
        print(json.dumps({"run": str(out), "kills": kills, "during_a_write": writes}), flush=True)


if __name__ == "__main__":
    main()
