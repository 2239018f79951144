"""The bits per byte that a recipe reaches in a given time: nano on the built-in corpus.

    python benchmarks/time_to_loss.py --seconds 600 adamw-8-2e-3 adamw-4-1e-3
    python benchmarks/time_to_loss.py --seconds 300 muon-8-6e-3 muon-4-4e-3
    python benchmarks/time_to_loss.py --steps 600 --seeds 1-3 preset preset,train.precision=bf16-mixed

A recipe is optimizer-sequences-rate, or `preset` for nano as it is, and key=value settings after commas.
AdamW comes with what GPT-2's successors give it: cosine to a tenth after a warmup, weight decay 0.1; Muon
with a constant learning rate and linear decay to 0. All take the steps of `smolctl train`.

The seconds of a step are measured first, all recipes in turns on all cores; they decide how many steps a
recipe gets in --seconds, or how long its --steps take. The runs themselves go on several at a time, one
thread each, and are not timed. Prints a line of JSON for each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from levers import seeds_of

from smolctl.benchmark.training_suite import CPU, TrainingStep
from smolctl.config import load_run_config
from smolctl.model.weights import initialize
from smolctl.runs.folder import RunFolder
from smolctl.timing import in_turns
from smolctl.training.device import muon_dtype
from smolctl.training.optim.optimizers import make_optimizer
from smolctl.training.process import keep_freed_memory

SCHEDULES = {
    "adamw": ["schedule.name=cosine", "schedule.warmup_steps=0.05", "optimizer.weight_decay=0.1"],
    "muon": ["schedule.decay_start=null", "schedule.decay_steps=0.5", "schedule.min_learning_rate=0"],
}


@dataclass(frozen=True)
class Recipe:
    """What distinguishes a run from the preset."""

    name: str
    settings: tuple[str, ...]  # key=value

    @staticmethod
    def parse(name: str) -> Recipe:
        first, *more = name.split(",")
        if first == "preset":
            return Recipe(name, tuple(more))
        optimizer, sequences, rate = first.split("-", 2)
        floor = [f"schedule.min_learning_rate={float(rate) / 10}"] if optimizer == "adamw" else []
        own = (
            f"optimizer.name={optimizer}",
            f"optimizer.learning_rate={float(rate)}",
            f"train.batch_size={sequences}",
            f"train.micro_batch_size={sequences}",
            *SCHEDULES[optimizer],
            *floor,
        )
        return Recipe(name, (*own, *more))


def training_step(recipe: Recipe) -> TrainingStep:
    """The step of a recipe on one fixed batch."""
    config = load_run_config("nano", [*recipe.settings, "schedule.decay_steps=0"])
    network = initialize(config.model, 0).train()
    optimizer = make_optimizer(network, config.optimizer, muon_dtype(config, CPU))
    shape = config.train.batch_size, config.data.sequence_length + 1
    tokens = torch.randint(0, config.model.vocab_size, shape)
    bfloat16 = config.train.precision == "bf16-mixed"
    return TrainingStep(
        lambda: network.loss(tokens[:, :-1], tokens[:, 1:]) / tokens.numel(), optimizer, bfloat16=bfloat16
    )


def trial(recipe: Recipe, seed: int, steps: int, folder: Path) -> dict[str, object]:
    """Train for a number of steps on one thread; the last validation."""
    out = folder / f"{recipe.name}-seed-{seed}".replace("/", "_")
    command = [sys.executable, "-m", "smolctl", "train", "nano", f"--steps={steps}", f"--out={out}", "-q"]
    often = (f"validation.every={steps}", f"checkpoint.every={steps}", "predictions.every=0")
    settings = [*recipe.settings, *often, "validation.sequences=256", "checkpoint.keep_last=1"]
    settings += [f"train.seed={seed}"]
    command += [f"--set={setting}" for setting in settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    check = [record for record in RunFolder(out).metrics() if record["event"] == "validation"][-1]
    return {key: check[key] for key in ("bits_per_byte", "standard_error")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="+", type=Recipe.parse)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=600, help="training time that each may take")
    length.add_argument("--steps", type=int, help="steps that each takes")
    parser.add_argument("--seeds", type=seeds_of, default=[0], help="such as 3, or 1-3")
    parser.add_argument("--rounds", type=int, default=15, help="of measuring a step")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    arguments = parser.parse_args()
    keep_freed_memory()
    measured = in_turns([training_step(recipe) for recipe in arguments.recipes], arguments.rounds, warmups=3)
    seconds = [median(step.seconds[0] for step in steps) for steps in measured]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as runs:

        def one(recipe: Recipe, of_step: float, seed: int) -> None:
            steps = arguments.steps or round(arguments.seconds / of_step)
            found = trial(recipe, seed, steps, Path(folder))
            facts = {"seconds": round(steps * of_step, 1), "step_seconds": round(of_step, 4), "steps": steps}
            print(json.dumps(asdict(recipe) | facts | {"seed": seed} | found), flush=True)

        works = [
            (*pair, seed) for seed in arguments.seeds for pair in zip(arguments.recipes, seconds, strict=True)
        ]
        list(runs.map(one, *zip(*works, strict=True)))


if __name__ == "__main__":
    main()
