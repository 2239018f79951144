"""Bits per byte that a recipe reaches in a given time: nano on the embedded corpus.

    python benchmarks/time_to_loss.py --seconds 600 adamw-8-2e-3 adamw-4-1e-3
    python benchmarks/time_to_loss.py --seconds 300 muon-8-6e-3 muon-4-4e-3

A recipe is optimizer-sequences-rate, and key=value settings after commas. AdamW comes with what GPT-2's
successors give it: cosine to a tenth after a warmup, a tenth of weight decay; Muon with this toolkit's hold
and linear decay to 0. Both take the steps of `smolctl train`: what differs is the recipe alone.

The seconds of a step are measured first, all recipes in turns on all cores; they say how many steps a recipe
has. The runs themselves then go on several at a time, one thread each, without a clock. Prints a line of JSON
for each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from smolctl.config import RunConfig, load_run_config
from smolctl.model.weights import initialize
from smolctl.timing import in_turns
from smolctl.training.fit import keep_freed_memory
from smolctl.training.optim.optimizers import make_optimizer

SCHEDULES = {
    "adamw": ["schedule.name=cosine", "schedule.warmup_steps=0.05", "optimizer.weight_decay=0.1"],
    "muon": ["schedule.decay_start=null", "schedule.decay_steps=0.5", "schedule.min_learning_rate=0"],
}


@dataclass(frozen=True)
class Recipe:
    """What distinguishes a run from the preset."""

    name: str
    optimizer: str
    sequences: int
    rate: float
    more: tuple[str, ...]  # key=value

    @staticmethod
    def parse(name: str) -> Recipe:
        first, *more = name.split(",")
        optimizer, sequences, rate = first.split("-", 2)
        return Recipe(name, optimizer, int(sequences), float(rate), tuple(more))

    @property
    def settings(self) -> list[str]:
        schedule = list(SCHEDULES[self.optimizer])
        if self.optimizer == "adamw":
            schedule.append(f"schedule.min_learning_rate={self.rate / 10}")
        return [
            f"optimizer.name={self.optimizer}",
            f"optimizer.learning_rate={self.rate}",
            f"train.batch_size={self.sequences}",
            f"train.micro_batch_size={self.sequences}",
            *schedule,
            *self.more,
        ]


def step_seconds(recipes: list[Recipe], rounds: int) -> list[float]:
    """Median seconds of a step of each, in turns and on all cores."""
    keep_freed_memory()
    steps = []
    for recipe in recipes:
        config = load_run_config("nano", [*recipe.settings, "schedule.decay_steps=0"])
        steps.append(_step(config))
    return [median(seconds) for seconds in in_turns(steps, rounds, warmups=3)]


def _step(config: RunConfig):  # type: ignore[no-untyped-def]
    network = initialize(config.model, 0).train()
    optimizer = make_optimizer(network, config.optimizer)
    length = config.data.sequence_length
    tokens = torch.randint(0, config.model.vocab_size, (config.train.batch_size, length + 1))

    def run() -> float:
        started = time.perf_counter()
        (network.loss(tokens[:, :-1], tokens[:, 1:]) / tokens.numel()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return run


def trial(recipe: Recipe, steps: int, folder: Path) -> dict[str, object]:
    """Train for so many steps on one thread; the last validation."""
    settings = [
        *recipe.settings,
        "predictions.every=0",
        f"validation.every={steps}",
        "validation.sequences=256",
        f"checkpoint.every={steps}",
        "checkpoint.keep_last=1",
    ]
    out = folder / recipe.name.replace("/", "_")
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
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    check = [record for record in records if record["event"] == "validation"][-1]
    return {key: check[key] for key in ("bits_per_byte", "standard_error")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", type=Recipe.parse)
    parser.add_argument("--seconds", type=float, default=600, help="training time that each may take")
    parser.add_argument("--rounds", type=int, default=15, help="of measuring a step")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    arguments = parser.parse_args()
    seconds = step_seconds(arguments.recipes, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as runs:

        def one(recipe: Recipe, of_step: float) -> None:
            steps = round(arguments.seconds / of_step)
            found = trial(recipe, steps, Path(folder))
            facts = {"seconds": arguments.seconds, "step_seconds": round(of_step, 4), "steps": steps}
            print(json.dumps({**asdict(recipe), **facts, **found}), flush=True)

        list(runs.map(one, arguments.recipes, seconds))


if __name__ == "__main__":
    main()
