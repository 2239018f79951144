"""AdamW against Muon on the nano model and the embedded corpus, with as many trials for both.

    python benchmarks/optimizers.py --steps 300 --rates 2e-3 3e-3 6e-3 1e-2

Every trial is a run of `smolctl train nano` with the same seed, order, batch and shape of schedule: a
warmup of a twentieth, and a decay to 0 over the second half. Prints one JSON document with the held-out bits
per byte and the median seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OPTIMIZERS = ("adamw", "muon")


def trial(optimizer: str, rate: str, steps: int, folder: Path) -> dict[str, object]:
    """Train once; the last validation and the median time of a step."""
    settings = {
        "optimizer.name": optimizer,
        "optimizer.learning_rate": rate,
        "schedule.warmup_steps": steps // 20,
        "schedule.decay_start": steps // 2,
        "schedule.decay_steps": steps - steps // 2,
        "schedule.min_learning_rate": 0,
        "predictions.every": 0,
        "validation.every": steps,
        "validation.batches": 32,
        "checkpoint.every": steps,
        "checkpoint.keep_last": 1,
    }
    out = folder / f"{optimizer}-{rate}"
    command = [
        sys.executable,
        "-m",
        "smolctl",
        "train",
        "nano",
        "--steps",
        str(steps),
        "--out",
        str(out),
        "-q",
    ]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    check = [record for record in records if record["event"] == "validation"][-1]
    seconds = statistics.median(record["seconds"] for record in records if record["event"] == "step")
    return {
        "optimizer": optimizer,
        "learning_rate": float(rate),
        "bits_per_byte": round(check["bits_per_byte"], 4),
        "standard_error": round(check["standard_error"], 4),
        "step_seconds": round(seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", nargs="+", default=["2e-3", "3e-3", "6e-3", "1e-2"])
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for rate in arguments.rates:
            for optimizer in OPTIMIZERS:  # interleaved: both see the same machine
                results.append(trial(optimizer, rate, arguments.steps, Path(folder)))
                print(results[-1], file=sys.stderr)
    print(json.dumps({"steps": arguments.steps, "trials": results}, indent=2))


if __name__ == "__main__":
    main()
