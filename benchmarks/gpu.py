"""Everything that a GPU has to show, in one command of under ten minutes.

    python benchmarks/gpu.py --out gpu.json

1. The training step of SmolLM2-135M's shape in bfloat16, eager and compiled, with windows of 1,024 and 2,048
   tokens: tokens a second and MFU, in turns with transformers and nanoGPT's step.
2. The real job: 5,000 steps of `smollm2-135m` with predictions and checkpoints, then `resume --extra 50`.
   The loss curve stays in the JSON document, every tenth step.

Without a GPU it is a rehearsal: the same path with the nano model and a few steps, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from training_sides import Case, Side

from smolctl.arithmetic import training_flops_per_token
from smolctl.config import load_run_config
from smolctl.timing import in_turns, ratio_of
from smolctl.training.device import peak_flops

TOLERANCE = 2e-2  # of the loss, relative: bfloat16 rounds to 0.4 %


def measure_steps(base: Case, rounds: int) -> list[dict[str, Any]]:
    """All sides step by step in turns; ratios are against ours, compiled."""
    compiled = replace(base, compiled=True)
    peers = [replace(compiled, side="transformers"), replace(compiled, side="nanogpt")]
    cases = [compiled, base, *peers, replace(base, side="transformers")]
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(case)) for case in cases]
        first = [side()["seconds"] for side in sides]  # compiles
        results = in_turns(sides, rounds, warmups=3)
    losses = [steps[0]["loss"] for steps in results]  # after a few updates; later the batch is known by heart
    if any(abs(loss / losses[0] - 1) > TOLERANCE for loss in losses):
        raise SystemExit(f"losses differ: {losses}")
    seconds = [[step["seconds"] for step in steps] for steps in results]
    flops = training_flops_per_token(load_run_config(base.preset).model, base.length)
    peak = peak_flops(torch.cuda.get_device_name(), "bf16-mixed") if base.device == "cuda" else None
    rows = []
    for side, before, steps, times in zip(sides, first, results, seconds, strict=True):
        speed = base.batch * base.length / median(times)
        rows.append(
            {
                "side": side.name,
                "tokens": [base.batch, base.length],
                "tokens_per_second": round(speed, 1),
                "mfu": round(speed * flops / peak, 4) if peak else None,
                "ours_is_faster": asdict(ratio_of(times, seconds[0])),
                "first_step_seconds": round(before, 1),
                "peak_gb": round(max(step["peak_bytes"] for step in steps) / 1e9, 2),
            }
        )
    saved = median(seconds[1]) - median(seconds[0])
    rows[0]["steps_worth_compiling"] = round((first[0] - first[1]) / saved) if saved > 0 else None
    return rows


def real_job(preset: str, steps: int, extra: int, folder: Path) -> dict[str, Any]:
    """Train and go on, as anyone would; the time of both and the loss curve."""
    run = folder / "run"
    commands = [
        ["train", preset, "--steps", str(steps), "--out", str(run)],
        ["resume", str(run), "--extra", str(extra)],
    ]
    seconds = []
    for command in commands:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "smolctl", *command, "-q"], check=True, stdout=sys.stderr)
        seconds.append(round(time.perf_counter() - started, 1))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    taken = [record for record in records if record["event"] == "step"]
    assert [record["step"] for record in taken] == list(range(1, steps + extra + 1))
    return {
        "preset": preset,
        "steps": [steps, extra],
        "seconds": seconds,
        "tokens_per_second": round(median(record["tokens_per_second"] for record in taken), 1),
        "loss": [[record["step"], round(record["loss"], 4)] for record in taken if record["step"] % 10 == 0],
        "validation": [
            [record["step"], round(record["bits_per_byte"], 4)]
            for record in records
            if record["event"] == "validation"
        ],
        "predictions": len((run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="the JSON document; default: standard output")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    if gpu:
        base = Case("smolctl", bfloat16=True, device="cuda")
        shapes, rounds = [(32, 1_024), (16, 2_048)], arguments.rounds
    else:
        base, shapes, rounds = Case("smolctl", preset="nano"), [(4, 64), (2, 128)], 2
    cases = [replace(base, batch=batch, length=length) for batch, length in shapes]
    steps = [row for case in cases for row in measure_steps(case, rounds)]
    with tempfile.TemporaryDirectory() as folder:
        job = real_job(*(("smollm2-135m", 5_000, 50) if gpu else ("nano", 20, 5)), Path(folder))
    found = {
        "rehearsal": not gpu,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
        "step": steps,
        "job": job,
    }
    text = json.dumps(found, indent=2) + "\n"
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
