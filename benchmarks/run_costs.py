"""What a run spends beside its steps, and what two processes gain: SmolLM2-135M's shape on a CPU.

    python benchmarks/run_costs.py --rounds 3

Every figure comes from real runs of `smolctl train --json`, by the moments at which their events arrive.
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
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from smolctl.timing import Spread, in_turns, ratio_of

EVERY = 500  # steps between checkpoints and predictions, as the presets have it
Moments = list[tuple[float, dict[str, Any]]]


def watch(folder: Path, processes: int, threads: int, arguments: argparse.Namespace) -> Moments:
    """Run `smolctl train`; its events with the moments at which they came."""
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
    command = [sys.executable, "-m", "smolctl", "train", "smollm2-135m-hub", "--tokenizer", "train:4096"]
    command += ["--steps", str(arguments.steps), "--out", str(folder / "run"), "--force", "--json"]
    command += ["--devices", str(processes), *(("--strategy", "ddp") if processes > 1 else ())]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    moments = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        for line in run.stdout:
            moments.append((time.perf_counter(), json.loads(line)))
    if run.returncode:
        raise SystemExit(f"the run ended with {run.returncode}")
    print(f"{processes} × {threads}: {step_seconds(moments):.2f} s a step", file=sys.stderr, flush=True)
    return moments


def step_seconds(moments: Moments) -> float:
    """Median time of a step; the first one, which allocates, does not count."""
    return median(event["seconds"] for _, event in moments if event["event"] == "step" and event["step"] > 1)


def between_steps(moments: Moments) -> float:
    """Median time from the end of a step to the beginning of the next: reading the batch, Lightning's loop,
    the records."""
    steps = [(moment, event["seconds"]) for moment, event in moments if event["event"] == "step"]
    gaps = [after - before - seconds for (before, _), (after, seconds) in pairwise(steps)]
    return median(gaps)


def after_last_step(moments: Moments) -> dict[str, float]:
    """Seconds that the last checkpoint and the predictions took, by their events."""
    last = max(index for index, (_, event) in enumerate(moments) if event["event"] == "step")
    found: dict[str, float] = {}
    before = moments[last][0]
    for moment, event in moments[last + 1 :]:
        if event["event"] in ("checkpoint", "prediction"):
            found[event["event"]] = found.get(event["event"], 0) + moment - before
            before = moment
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of every run")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        kinds = [(1, 1), (1, 2), (2, 1)]
        runs = [lambda kind=kind: watch(Path(name), *kind, arguments) for kind in kinds]
        one, threads, processes = in_turns(runs, arguments.rounds, warmups=0)
    seconds = [[step_seconds(run) for run in runs] for runs in (one, threads, processes)]
    costs = [after_last_step(run) for run in threads]
    step = median(seconds[1])
    share = {
        "between_steps": median(between_steps(run) for run in threads) / step,
        "checkpoint": median(cost["checkpoint"] for cost in costs) / (EVERY * step),
        "predictions": median(cost["prediction"] for cost in costs) / (EVERY * step),
    }
    found = {
        "tokens": [arguments.batch, arguments.length],
        "step_seconds": {
            name: asdict(Spread.of(of_kind))
            for name, of_kind in zip(
                ("one thread", "two threads", "two processes, a thread each"), seconds, strict=True
            )
        },
        "two_processes_against_one_thread": asdict(ratio_of(seconds[0], seconds[2])),
        "two_processes_against_two_threads": asdict(ratio_of(seconds[1], seconds[2])),
        "seconds": {
            "between_steps": [round(between_steps(run), 4) for run in threads],
            "checkpoint": [round(cost["checkpoint"], 2) for cost in costs],
            "predictions": [round(cost["prediction"], 2) for cost in costs],
        },
        "share_of_step_time": {name: round(value, 5) for name, value in share.items()},
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
