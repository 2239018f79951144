"""Everything that a GPU has to show, in one command of under ten minutes.

    python benchmarks/gpu.py --out gpu.json

1. The training step of SmolLM2-135M's shape in bfloat16, eager and compiled, with sequences of 1,024 and
   2,048 tokens: tokens a second and MFU, in turns with transformers and nanoGPT's step.
2. The real job: 5,000 steps of `smollm2-135m` with predictions and checkpoints, then `resume --extra 50`.
   The JSON document keeps the loss of every tenth step.

Without a GPU it is a rehearsal: the same path with the nano model and a few steps, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from training_engines import Case, llama_folder, steps_in_turns

from smolctl.arithmetic import training_flops_per_token
from smolctl.runs.folder import RunFolder
from smolctl.sources import open_source
from smolctl.timing import ratio_of
from smolctl.training.device import peak_flops

TOLERANCE = 2e-2  # of the loss, relative: bfloat16 rounds to 0.4 %


def measure_steps(base: Case, rounds: int) -> list[dict[str, Any]]:
    """All engines step by step in turns; ratios are against smolctl, compiled."""
    compiled = replace(base, compiled=True)
    peers = [replace(compiled, engine="transformers"), replace(compiled, engine="nanogpt")]
    cases = [compiled, base, *peers, replace(base, engine="transformers")]
    # Only the losses after a few updates are compared: later all are near 0.
    measured = steps_in_turns(cases, rounds, warmups=3, tolerance=TOLERANCE, compared=1)
    first = [steps[0].seconds[0] for steps in measured]
    seconds = [[step.seconds[0] for step in steps[1:]] for steps in measured]
    flops = training_flops_per_token(open_source(base.model).require_config(), base.length)
    peak = peak_flops(torch.cuda.get_device_name(), "bf16-mixed") if base.device == "cuda" else None
    rows: list[dict[str, Any]] = []
    for case, steps, times in zip(cases, measured, seconds, strict=True):
        speed = base.batch * base.length / median(times)
        rows.append(
            {
                "side": case.name,
                "tokens": [base.batch, base.length],
                "tokens_per_second": round(speed, 1),
                "mfu": round(speed * flops / peak, 4) if peak else None,
                "ours_is_faster": asdict(ratio_of(times, seconds[0])),
                "first_step_seconds": round(steps[0].seconds[0], 1),
                "peak_gb": round(max(step.peak_bytes or 0 for step in steps) / 1e9, 2),
            }
        )
    saved = median(seconds[1]) - median(seconds[0])
    rows[0]["steps_worth_compiling"] = round((first[0] - first[1]) / saved) if saved > 0 else None
    return rows


def real_job(preset: str, steps: int, extra: int, folder: Path) -> dict[str, Any]:
    """Train and resume, as a user would: the time of both and the loss curve."""
    run = folder / "run"
    seconds = []
    for command in (
        ["train", preset, f"--steps={steps}", f"--out={run}"],
        ["resume", run, f"--extra={extra}"],
    ):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "smolctl", *command, "-q"], check=True, stdout=sys.stderr)
        seconds.append(round(time.perf_counter() - started, 1))
    records = list(RunFolder(run).metrics())
    taken = [record for record in records if record["event"] == "step"]
    checks = [record for record in records if record["event"] == "validation"]
    assert [record["step"] for record in taken] == list(range(1, steps + extra + 1))
    return {
        "preset": preset,
        "steps": [steps, extra],
        "seconds": seconds,
        "tokens_per_second": round(median(record["tokens_per_second"] for record in taken), 1),
        "loss": [[record["step"], round(record["loss"], 4)] for record in taken if record["step"] % 10 == 0],
        "validation": [[record["step"], round(record["bits_per_byte"], 4)] for record in checks],
        "predictions": len((run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="the JSON document; default: standard output")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    shapes, rounds = ([(32, 1_024), (16, 2_048)], arguments.rounds) if gpu else ([(4, 64), (2, 128)], 2)
    with llama_folder("smollm2-135m-hub" if gpu else "nano") as model:
        base = Case("smolctl", model, bfloat16=gpu, device="cuda" if gpu else "cpu")
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
    text = json.dumps(found, indent=2)
    arguments.out.write_text(f"{text}\n", encoding="utf-8") if arguments.out else print(text)


if __name__ == "__main__":
    main()
