"""Everything that a GPU has to show, in one command: about ten minutes of an H100.

    python benchmarks/gpu.py --out gpu.json [--only steps --only exact …]

steps:     the training step of SmolLM2-135M's shape in bfloat16, compiled and not: tokens a second, MFU and
           memory, in turns with transformers and nanoGPT's step.
documents: attention within documents, by one kernel for all and by a mask: the same loss and gradient, and
           the time of both.
exact:     a short run whose last steps are repeated, compared bit for bit by `resume --verify`; with
           several GPUs, on two of them as well.
job:       5,000 steps of `smollm2-135m` with predictions and checkpoints every 500, then `resume --extra 50`.

What a part has found is written as soon as it ends, and a part that fails does not end the others. Without a
GPU it is a rehearsal: the same path with the nano model and a few steps, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from training_engines import Case, llama_folder, steps_in_turns

from smolctl.arithmetic import training_flops_per_token
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize
from smolctl.runs.folder import RunFolder
from smolctl.sources import open_source
from smolctl.timing import in_turns, ratio_of
from smolctl.training.device import peak_flops

TOLERANCE = 2e-2  # of the loss, relative: bfloat16 rounds to 0.4 %
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PRESET = "smollm2-135m" if GPU else "nano"

Found = dict[str, Any]


def steps(rounds: int) -> list[Found]:
    """A step of each engine, of sequences of 1,024 tokens, then ours alone for other shapes."""
    with llama_folder("smollm2-135m-hub" if GPU else "nano") as model:
        batch, length = (8, 1_024) if GPU else (4, 64)  # all engines are in the GPU's memory together
        base = Case("smolctl", model, bfloat16=GPU, batch=batch, length=length, device=DEVICE.type)
        compiled = replace(base, compiled=True)
        peers = [replace(compiled, engine=engine) for engine in ("transformers", "nanogpt")]
        rows = measured([compiled, base, *peers, replace(base, engine="transformers")], rounds)
        for shape in ((2 * batch, length), (8 * batch, length), (batch, 2 * length)):
            rows += measured([replace(compiled, batch=shape[0], length=shape[1])], rounds)
    return rows


def measured(cases: list[Case], rounds: int) -> list[Found]:
    """The cases step by step in turns; ratios are against the first."""
    # Only the losses after a few updates are compared: later all are near 0.
    runs = steps_in_turns(cases, rounds, warmups=3, tolerance=TOLERANCE, compared=1)
    times = [[step.seconds[0] for step in steps[1:]] for steps in runs]
    flops = training_flops_per_token(open_source(cases[0].model).require_config(), cases[0].length)
    peak = peak_flops(torch.cuda.get_device_name(), "bf16-mixed") if GPU else None
    rows = []
    for case, steps, seconds in zip(cases, runs, times, strict=True):
        speed = case.batch * case.length / median(seconds)
        rows.append(
            {
                "engine": case.name,
                "tokens": [case.batch, case.length],
                "tokens_per_second": round(speed, 1),
                "mfu": round(speed * flops / peak, 4) if peak else None,
                "first_is_faster": asdict(ratio_of(seconds, times[0])),
                "first_step_seconds": round(steps[0].seconds[0], 1),
                "peak_gb": round(max(step.peak_bytes or 0 for step in steps) / 1e9, 2),
            }
        )
    return rows


def documents(rounds: int) -> Found:
    """Loss, gradient and time of attention within documents of some 100 tokens, apart and by a mask."""
    config = open_source(PRESET).require_config()
    length = config.max_position_embeddings
    torch.manual_seed(0)
    network = initialize(config, seed=0).to(DEVICE).train()
    tokens = torch.randint(0, config.vocab_size, (4, length + 1), device=DEVICE)
    owners = (torch.rand(4, length, device=DEVICE) < 0.01).cumsum(1)

    def step(with_mask: bool) -> tuple[float, torch.Tensor]:
        network.model.masks_documents = with_mask
        network.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            loss = network.loss(tokens[:, :-1], tokens[:, 1:], owners) / owners.numel()
        loss.backward()
        return loss.item(), flat_gradient(network)

    (apart, gradient), (masked, expected) = step(False), step(True)
    error = ((gradient - expected).norm() / expected.norm()).item()
    seconds = in_turns([lambda: timed(step, False), lambda: timed(step, True)], rounds, warmups=2)
    return {
        "loss": [apart, masked],
        "gradient_error": error,
        "apart_is_faster": asdict(ratio_of(*seconds[::-1])),
    }


def flat_gradient(network: Transformer) -> torch.Tensor:
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients])


def timed(step: Callable[[bool], object], with_mask: bool) -> float:
    started = time.perf_counter()
    step(with_mask)
    return time.perf_counter() - started


def smolctl(*arguments: object) -> float:
    """Run a command; the seconds that it took."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "smolctl", *map(str, arguments), "-q"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return round(time.perf_counter() - started, 1)


def exact(folder: Path) -> Found:
    """Whether a run repeated from a checkpoint has the same bits, in each way of computing."""
    found: Found = {}
    ways: dict[str, tuple[str, ...]] = {
        "eager": ("train.compile=false",),
        "compiled": ("train.compile=true",),
    }
    if torch.cuda.device_count() > 1:
        ways["two devices"] = ("train.compile=false", "trainer.devices=2")
    for way, settings in ways.items():
        run = folder / way.replace(" ", "-")
        options = [f"--set={setting}" for setting in (*settings, "checkpoint.every=10", "validation.every=0")]
        smolctl("train", PRESET, "--steps=20", f"--out={run}", *options)
        try:
            smolctl("resume", run, "--verify")
        except subprocess.CalledProcessError as error:
            found[way] = f"exit {error.returncode}"
        else:
            found[way] = True
    return found


def job(folder: Path) -> Found:
    """Train and resume, as a user would: the time of both and the loss curve."""
    run, (steps, extra) = folder / "run", (5_000, 50) if GPU else (20, 5)
    seconds = [
        smolctl("train", PRESET, f"--steps={steps}", "--micro-batch-size=8", f"--out={run}"),
        smolctl("resume", run, f"--extra={extra}"),
    ]
    records = list(RunFolder(run).metrics())
    taken = [record for record in records if record["event"] == "step"]
    checks = [record for record in records if record["event"] == "validation"]
    assert [record["step"] for record in taken] == list(range(1, steps + extra + 1))
    mfu = [record["mfu"] for record in taken if record.get("mfu") is not None]
    return {
        "preset": PRESET,
        "steps": [steps, extra],
        "seconds": seconds,
        "tokens_per_second": round(median(record["tokens_per_second"] for record in taken), 1),
        "mfu": round(median(mfu), 4) if mfu else None,
        "loss": [[record["step"], round(record["loss"], 4)] for record in taken if record["step"] % 10 == 0],
        "validation": [[record["step"], round(record["bits_per_byte"], 4)] for record in checks],
        "peak_gb": round(max(record["memory_bytes"] or 0 for record in taken) / 1e9, 2),
        "predictions": len((run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", action="append", help="one part; repeatable; default: all")
    parser.add_argument("--out", type=Path, required=True, help="the JSON document")
    arguments = parser.parse_args()
    rounds = arguments.rounds if GPU else 2
    found: Found = {
        "rehearsal": not GPU,
        "device": torch.cuda.get_device_name() if GPU else "cpu",
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], object]] = {
            "steps": lambda: steps(rounds),
            "documents": lambda: documents(rounds),
            "exact": lambda: exact(Path(folder)),
            "job": lambda: job(Path(folder)),
        }
        for name in arguments.only or parts:
            started = time.perf_counter()
            try:
                found[name] = parts[name]()
            except Exception as error:
                traceback.print_exc()
                found[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
            arguments.out.write_text(f"{json.dumps(found, indent=2)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
