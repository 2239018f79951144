"""All GPU measurements in one command, which takes about ten minutes on an H100.

    python benchmarks/gpu.py --out gpu.json [--only exact --only job …]
    python benchmarks/gpu.py --out gpu.json --print

exact:     a short run in bfloat16, compiled and not, whose last steps are repeated and compared bit for bit
           by `resume --verify`; with several GPUs, on two of them as well.
job:       5,000 steps of `smollm2-135m` with predictions and checkpoints every 500, then `resume --extra 50`.
steps:     the training step of SmolLM2-135M's shape in bfloat16, compiled and not: tokens a second, MFU and
           memory, in turns with transformers, nanoGPT's step and, if it is installed, litgpt.
documents: attention within documents by a mask, by FlashAttention with lengths, and by FlexAttention in
           compiled blocks: the loss and gradient of each against those of the mask, and the time.

A machine may be taken away at any moment: what is known is in the file within seconds, that of a run at work
too, and what fails does not end the rest. Beside the file, of some 50 kB, goes a picture of the job's
loss. At the end, and with --print, all is printed as Markdown. Without a GPU it is a rehearsal: the same path
with the nano model and a few steps, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from training_engines import Case, llama_folder, steps_in_turns

from smolctl.arithmetic import training_flops_per_token
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize
from smolctl.runs.layout import LOSS_CURVE
from smolctl.sources import open_source
from smolctl.timing import in_turns, ratio_of
from smolctl.training.device import peak_flops

TOLERANCE = 2e-2  # of the loss, relative: bfloat16 rounds to 0.4 %
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PRESET = "smollm2-135m" if GPU else "nano"
MINUTES = {"exact": 3, "job": 5, "steps": 3, "documents": 0.5}  # about, of an H100; in this order
SECONDS_BETWEEN_LOOKS = 10  # at a run at work

Found = dict[str, Any]


def attempt(work: Callable[[], Any]) -> Any:
    """What a function finds, or how it has failed: the rest goes on."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def steps(rounds: int) -> Iterator[Found]:
    """A step of each engine, of sequences of 1,024 tokens, then ours alone for other shapes."""
    with llama_folder("smollm2-135m-hub" if GPU else "nano") as model:
        batch, length = (8, 1_024) if GPU else (4, 64)  # all engines are in the GPU's memory together
        base = Case("smolctl", model, bfloat16=GPU, batch=batch, length=length, device=DEVICE.type)
        compiled = replace(base, compiled=True)
        peers = [replace(compiled, engine=engine) for engine in ("transformers", "nanogpt")]
        if find_spec("litgpt"):
            peers.append(replace(compiled, engine="litgpt"))
        shapes = ((2 * batch, length), (8 * batch, length), (batch, 2 * length))
        groups = [
            [compiled, base],
            *([replace(compiled, batch=sequences, length=tokens)] for sequences, tokens in shapes),
            [compiled, *peers, replace(base, engine="transformers")],
        ]
        rows: list[Found] = []
        for group in groups:
            found = attempt(partial(measured, group, rounds))
            rows += found if isinstance(found, list) else [found]
            yield {"rows": rows}


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


def documents(rounds: int) -> Iterator[Found]:
    """Loss, gradient and time of attention within documents of some 100 tokens, in each way."""
    config = open_source(PRESET).require_config()
    length = config.max_position_embeddings
    torch.manual_seed(0)
    network = initialize(config, seed=0).to(DEVICE).train()
    tokens = torch.randint(0, config.vocab_size, (4, length + 1), device=DEVICE)
    owners = (torch.rand(4, length, device=DEVICE) < 0.01).cumsum(1)

    def step(way: str) -> tuple[float, torch.Tensor]:
        network.model.masks_documents = way == "mask"
        network.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            loss = network.loss(tokens[:, :-1], tokens[:, 1:], owners) / owners.numel()
        loss.backward()
        return loss.item(), flat_gradient(network)

    masked, expected = step("mask")
    apart, gradient = step("lengths")
    error = ((gradient - expected).norm() / expected.norm()).item()
    found: Found = {"loss": [apart, masked], "gradient_error": error}
    seconds = in_turns([lambda: timed(step, "lengths"), lambda: timed(step, "mask")], rounds, warmups=2)
    yield (found := found | {"apart_is_faster": asdict(ratio_of(*seconds[::-1]))})
    network.compile_blocks()
    loss, gradient = step("compiled")
    error = ((gradient - expected).norm() / expected.norm()).item()
    yield found | {"compiled": {"loss": loss, "gradient_error": error}}


def flat_gradient(network: Transformer) -> torch.Tensor:
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients])


def timed(step: Callable[[str], object], way: str) -> float:
    started = time.perf_counter()
    step(way)
    return time.perf_counter() - started


def command(*arguments: object) -> list[str]:
    """A command of smolctl."""
    return [sys.executable, "-m", "smolctl", *map(str, arguments)]


def exact(folder: Path) -> Iterator[Found]:
    """Whether a run repeated from a checkpoint has the same bits, in each way of computing."""
    ways: dict[str, tuple[str, ...]] = {
        "compiled": ("train.compile=true",),
        "compiled, documents": ("train.compile=true", "data.document_masking=true"),
        "eager": ("train.compile=false",),
    }
    if torch.cuda.device_count() > 1:
        ways["two devices"] = ("train.compile=false", "trainer.devices=2")
    always = (
        "train.precision=bf16-mixed",
        "checkpoint.every=10",
        "validation.every=0",
        "predictions.every=0",
    )
    found: Found = {}
    for way, settings in ways.items():
        run = folder / way.replace(" ", "-").replace(",", "")
        options = [f"--set={setting}" for setting in (*settings, *always)]
        found[way] = attempt(partial(verified, run, options))
        shutil.rmtree(run, ignore_errors=True)
        yield found


def verified(run: Path, options: Sequence[str]) -> Found:
    """What `resume --verify` says of a run of 20 steps."""
    subprocess.run(
        command("train", PRESET, "--steps=20", f"--out={run}", *options, "-q"), check=True, stdout=sys.stderr
    )
    verdict = subprocess.run(command("resume", run, "--verify", "--json"), stdout=subprocess.PIPE, text=True)
    lines = verdict.stdout.splitlines()
    return {"exit": verdict.returncode, **json.loads(lines[-1] if lines else "{}")}


def job(folder: Path, picture: Path) -> Iterator[Found]:
    """Train and resume, as a user would: the time of both and the loss curve, from time to time."""
    run, events, (total, extra) = folder / "run", folder / "events.jsonl", (5_000, 50) if GPU else (20, 5)
    options = [] if GPU else ["--set=checkpoint.every=10", "--set=predictions.every=10"]
    found: Found = {"preset": PRESET, "steps": [total, extra], "seconds": []}
    for arguments in (
        ("train", PRESET, f"--steps={total}", "--micro-batch-size=8", f"--out={run}", *options),
        ("resume", run, f"--extra={extra}"),
    ):
        started = time.perf_counter()
        with events.open("ab") as stream:
            process = subprocess.Popen(command(*arguments, "--json"), stdout=stream)
        try:
            while process.poll() is None:
                time.sleep(min(SECONDS_BETWEEN_LOOKS, 1 + time.perf_counter() - started))
                yield found | told(events)
        finally:
            process.kill()
        found["seconds"].append(round(time.perf_counter() - started, 1))
        if (run / LOSS_CURVE).is_file():
            shutil.copyfile(run / LOSS_CURVE, picture)
        yield found | told(events)
        if process.returncode:
            raise RuntimeError(f"{arguments[0]} has ended with exit code {process.returncode}")


def told(path: Path) -> Found:
    """What the events of a run say so far."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    of = {kind: [event for event in events if event["event"] == kind] for kind in ("start", "step")}
    if not of["step"]:
        return {}
    mfu = [step["mfu"] for step in of["step"] if step["mfu"] is not None]
    plan, memory = of["start"][0]["plan"], max(step["memory_bytes"] or 0 for step in of["step"])
    numbers = [step["step"] for step in of["step"]]
    assert numbers == list(range(1, len(numbers) + 1))
    return {
        "steps_taken": len(numbers),
        "tokens_per_second": round(median(step["tokens_per_second"] for step in of["step"]), 1),
        "mfu": round(median(mfu), 4) if mfu else None,
        "planned": {key: plan[key] for key in ("tokens_per_second", "eta_s", "memory_bytes")},
        "peak_gb": round(memory / 1e9, 2),
        "loss": [[one["step"], round(one["loss"], 4)] for one in of["step"] if one["step"] % 10 == 0],
        "validation": [
            [one["step"], round(one["bits_per_byte"], 4)] for one in events if one["event"] == "validation"
        ],
        "checkpoint_seconds": [round(one["seconds"], 1) for one in events if one["event"] == "checkpoint"],
        "predictions": [
            [one["step"], one["prompt"], one["text"]] for one in events if one["event"] == "prediction"
        ],
    }


def printed(found: Found) -> str:
    """Everything that was found, as Markdown."""
    lines = [f"{found['device']}, PyTorch {found['torch']}{', a rehearsal' * found['rehearsal']}", ""]
    lines += [f"exact, {way}: {json.dumps(verdict)}" for way, verdict in found.get("exact", {}).items()]
    if "documents" in found:
        lines.append(f"documents: {json.dumps(found['documents'])}")
    done = found.get("job", {})
    lines += [f"job, {key}: {json.dumps(done[key])}" for key in done if key not in ("loss", "predictions")]
    lines += [""]
    taken = found.get("steps", {})
    rows = [*taken.get("rows", ()), *([taken] if "failed" in taken else ())]
    if rows:
        lines += ["| step | tokens | tokens/s | MFU | peak GB | time over the first's |", "|---" * 6 + "|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['failed']} |")
            continue
        sequences, length = row["tokens"]
        spread, mfu = row["first_is_faster"]["spread"], "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        ratio = f"{spread['median']:.2f} ({spread['low']:.2f}–{spread['high']:.2f})"
        cells = (row["engine"], f"{sequences} × {length}", f"{row['tokens_per_second']:,.0f}", mfu)
        lines.append(f"| {' | '.join((*cells, str(row['peak_gb']), ratio))} |")
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> None:
    """Measure part by part, and write what is known from time to time."""
    parts = list(dict.fromkeys(arguments.only or MINUTES))
    found: Found = {
        "rehearsal": not GPU,
        "device": torch.cuda.get_device_name() if GPU else "cpu",
        "torch": torch.__version__,
        "minutes": {},
    }
    rounds = arguments.rounds if GPU else 2
    expected = ", ".join(f"{part} {MINUTES[part]:g}" for part in parts)
    print(f"On {found['device']}, into {arguments.out}. Minutes of an H100: {expected}.", file=sys.stderr)

    def save() -> None:
        partial_file = arguments.out.with_suffix(".partial")
        partial_file.write_text(f"{json.dumps(found, ensure_ascii=False)}\n", encoding="utf-8")
        partial_file.replace(arguments.out)

    def take(part: str, findings: Iterator[Found]) -> None:
        for found[part] in findings:
            save()

    save()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # of `timeout`: what was started ends too
    with tempfile.TemporaryDirectory() as folder:
        works: dict[str, Callable[[], Iterator[Found]]] = {
            "exact": lambda: exact(Path(folder)),
            "job": lambda: job(Path(folder), arguments.out.with_suffix(".png")),
            "steps": lambda: steps(rounds),
            "documents": lambda: documents(rounds),
        }
        for part in parts:
            started = time.perf_counter()
            if failure := attempt(partial(take, part, works[part]())):
                found[part] = found.get(part, {}) | failure
            found["minutes"][part] = round((time.perf_counter() - started) / 60, 1)
            print(f"{part}: {found['minutes'][part]} minutes", file=sys.stderr)
            save()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", action="append", choices=MINUTES, help="one part; repeatable; default: all")
    parser.add_argument("--out", type=Path, required=True, help="the JSON document")
    parser.add_argument("--print", action="store_true", help="print what an earlier call has found")
    arguments = parser.parse_args()
    if not arguments.print:
        measure(arguments)
    print(printed(json.loads(arguments.out.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
