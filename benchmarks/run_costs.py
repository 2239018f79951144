"""The time of a run outside its steps, and the gain from two processes: SmolLM2-135M's shape on a CPU.

    python benchmarks/run_costs.py --rounds 3

Every figure comes from real runs of `smolctl train --json`: from the times at which their events arrive.
Three kinds of run take turns: one process with one thread, one with two, and two processes (DDP) with a
thread each. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from smolctl.timing import Spread, in_turns, ratio_of

EVERY = 500  # steps between checkpoints and predictions, as the presets have it
KINDS = {"one thread": (1, 1), "two threads": (1, 2), "two processes, a thread each": (2, 1)}


def watch(folder: Path, processes: int, threads: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Run `smolctl train` and return what it spends: seconds by name."""
    settings = {
        "data.sequence_length": arguments.length,
        "train.batch_size": arguments.batch,
        "train.micro_batch_size": arguments.batch,
        "validation.every": 0,
        "predictions.every": arguments.steps,
        "checkpoint.every": arguments.steps,
        "checkpoint.keep_last": 1,
        "trainer.accelerator": "cpu",
    }
    command = [sys.executable, "-m", "smolctl", "train", arguments.preset, "--tokenizer=train:4096"]
    command += [f"--steps={arguments.steps}", f"--out={folder / 'run'}", "--force", "--json"]
    command += [f"--devices={processes}", *(["--strategy=ddp"] if processes > 1 else [])]
    command += [f"--set={key}={value}" for key, value in settings.items()]
    threaded = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=threaded) as run:
        assert run.stdout is not None
        events = [(time.perf_counter(), json.loads(line)) for line in run.stdout]
    if run.returncode:
        raise SystemExit(f"the run ended with {run.returncode}")
    found = spent(events)
    print(f"{processes} × {threads}: {found['step']:.2f} s a step", file=sys.stderr, flush=True)
    return found


def spent(events: list[tuple[float, dict[str, Any]]]) -> dict[str, float]:
    """Median seconds of a step and between two steps, and those of the last checkpoint and predictions.

    The first step, which allocates, does not count. Between two, a run reads the batch and writes records.
    """
    steps = [(moment, float(event["seconds"])) for moment, event in events if event["event"] == "step"]
    found = {
        "step": median(seconds for _, seconds in steps[1:]),
        "between_steps": median(after - before - last for (before, _), (after, last) in pairwise(steps)),
        "checkpoint": 0.0,
        "prediction": 0.0,
    }
    before = steps[-1][0]
    for moment, event in events:
        if moment > before and event["event"] in ("checkpoint", "prediction"):
            found[event["event"]] += moment - before
            before = moment
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="smollm2-135m-hub", help="the model; a smaller one to try")
    parser.add_argument("--steps", type=int, default=4, help="of every run")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        works = [partial(watch, Path(name), *kind, arguments) for kind in KINDS.values()]
        measured = in_turns(works, arguments.rounds, warmups=0)
    one, two, processes = ([run["step"] for run in runs] for runs in measured)
    runs = measured[1]
    usual = {name: median(run[name] for run in runs) for name in runs[0]}
    between, rest = usual["between_steps"] / usual["step"], EVERY * usual["step"]
    found = {
        "tokens": [arguments.batch, arguments.length],
        "step_seconds": dict(
            zip(KINDS, (asdict(Spread.of(of)) for of in (one, two, processes)), strict=True)
        ),
        "two_processes_against_one_thread": asdict(ratio_of(one, processes)),
        "two_processes_against_two_threads": asdict(ratio_of(two, processes)),
        "seconds": {
            "between_steps": [round(run["between_steps"], 4) for run in runs],
            "checkpoint": [round(run["checkpoint"], 2) for run in runs],
            "predictions": [round(run["prediction"], 2) for run in runs],
        },
        "share_of_step_time": {
            "between_steps": round(between, 5),
            "checkpoint": round(usual["checkpoint"] / rest, 5),
            "predictions": round(usual["prediction"] / rest, 5),
        },
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
