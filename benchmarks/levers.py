"""The effect of changes to nano's recipe: time and steps to a loss with each change, over several seeds.

    python benchmarks/levers.py prepare                                    # the corpus, once
    python benchmarks/levers.py check                                      # the steps are smolctl's own
    python benchmarks/levers.py run --levers all --seeds 1-3 --workers 12  # on a GPU where there is one
    python benchmarks/levers.py cost --levers all                          # on the CPU that counts
    python benchmarks/levers.py judge runs.jsonl                           # the table

`lever_recipes.py` lists the changes, called levers; `a+b` combines two, `a@600` trains for 600 steps. A run
is one line of runs.jsonl, written when it ends, and is not repeated by the next call. Runs with the same seed
start from the same weights and read the same tokens in the same order. All of them compute in float32, and
are scored as by `smolctl compare` on the same held-out documents.

The table shows bits per byte; the difference from the preset with the same seeds, with its 95 % interval over
seeds and documents, and p of Student's t-test over the seeds; how many of the preset's steps one step
replaces, from runs of the preset with several numbers of steps (base@300 base base@600); the cost of a step
on this CPU, in turns with the preset's; and the time to the same loss, which is the cost divided by the steps
replaced.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from lever_recipes import LEVERS, Recipe
from lever_trial import EAGER_STEPS, Trial, TrialData, windows_of

from smolctl.evaluation.estimate import observations, resampled_estimate
from smolctl.timing import in_turns, ratio_of

HELD_OUT = 0.1  # share of the documents: five times the preset's, for narrower intervals
PART = 4_096  # bytes of a document that are one observation where documents are few, as in `compare`
PRESET = Recipe(("base",))
Record = dict[str, Any]


def prepare(path: Path) -> None:
    """Write the tokens of the embedded corpus, and its held-out documents as `compare` reads them."""
    from smolctl.config import load_run_config
    from smolctl.training.prepare import prepare as prepare_run

    config = load_run_config("nano", [f"data.validation_fraction={HELD_OUT}"])
    made = prepare_run(config, None, lambda _: None)
    end, lengths = made.tokenizer.end_of_text_id, made.tokenizer.token_byte_lengths()
    assert made.corpus.validation is not None
    train, held_out = (_all_tokens(mixture) for mixture in (made.corpus.train, made.corpus.validation))
    documents = [ids[ids != end] for ids in np.split(held_out, np.flatnonzero(held_out == end) + 1)]
    documents = [ids for ids in documents if len(ids)]
    begins = [np.cumsum(lengths[ids]) - lengths[ids] for ids in documents]  # bytes before each token
    rows, counted, owners, places = windows_of(documents, end, config.data.sequence_length)
    parts = np.array(
        [begins[owner][place] // PART for owner, place in zip(owners.flat, places.flat, strict=True)]
    )
    observed = np.unique(observations(owners.flat, parts), return_inverse=True)[1].reshape(owners.shape)
    sizes = np.bincount(observed[counted], lengths[rows[:, 1:]][counted])
    np.savez_compressed(
        path,
        train=train.astype(np.uint16),
        end=end,
        held_out=rows,
        counted=counted,
        owners=observed.astype(np.int16),
        sizes=sizes,
    )
    print(f"{path}: {len(train):,} tokens to train on, {counted.sum():,} held out, {len(sizes)} observations")


def _all_tokens(mixture: Any) -> Any:
    (part,) = mixture.parts
    return part.tokens.read(0, len(part.tokens))


def set_up() -> torch.device:
    """The device, and what holds for every process: one thread, float32 without TF32."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_one(recipe: Recipe, seed: int, data_path: Path, graphs: bool) -> Record:
    """Train and score one run."""
    marks = [time.perf_counter()]
    device, data = set_up(), TrialData.read(data_path)
    trial = Trial(recipe, seed, data, device, graphs)
    marks.append(time.perf_counter())
    for _ in range(recipe.steps):
        trial.step()
    losses = trial.losses.tolist()  # waits for the device
    marks.append(time.perf_counter())
    bits = trial.score()
    marks.append(time.perf_counter())
    return {
        "levers": list(recipe.levers),
        "steps": recipe.steps,
        "seed": seed,
        "bits_per_byte": float(bits.sum() / data.sizes.sum()),
        "bits": [round(one, 3) for one in bits.tolist()],
        "last_losses": [round(one, 4) for one in losses[-5:]],
        "seconds": [
            round(after - before, 2) for before, after in pairwise(marks)
        ],  # prepared, trained, scored
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "graphs": graphs,
        "torch": torch.__version__,
    }


def run(arguments: argparse.Namespace) -> None:
    """Take all runs that are not in the file yet, seed by seed: what was cut off can be judged too."""
    done = {(Recipe(tuple(r["levers"]), r["steps"]), r["seed"]) for r in records([arguments.out])}
    jobs = [(recipe, seed) for seed in arguments.seeds for recipe in arguments.levers]
    jobs = [job for job in jobs if job not in done]
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(arguments.workers, context) as pool,
        arguments.out.open("a", encoding="utf-8") as file,
    ):
        if file.tell() and not arguments.out.read_text(encoding="utf-8").endswith("\n"):
            file.write("\n")  # after a line that was cut off
        work = {pool.submit(run_one, *job, arguments.data, arguments.graphs): job for job in jobs}
        for number, future in enumerate(as_completed(work), 1):
            recipe, seed = work[future]
            if error := future.exception():
                print(f"{recipe.name} seed {seed}: {type(error).__name__}: {error}", flush=True)
                continue
            found = future.result()
            file.write(f"{json.dumps(found)}\n")
            file.flush()
            passed, score = time.perf_counter() - started, found["bits_per_byte"]
            result = f"{recipe.name} seed {seed}: {score:.4f} {found['seconds']}"
            print(f"{passed:6.1f} s  {number}/{len(jobs)}  {result}", flush=True)


def records(paths: Sequence[Path]) -> Iterator[Record]:
    """The runs in files; a last line that was cut off does not count."""
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                print(f"{path}: a line that is cut off", file=sys.stderr)


def check(arguments: argparse.Namespace) -> None:
    """Compare steps here with those of smolctl's own optimizer, and with replayed ones.

    Raises:
        SystemExit: they differ.
    """
    data, device = TrialData.read(arguments.data), set_up()
    for recipe in (PRESET, Recipe(("table-2",))):
        _check(recipe, data, device)
    if device.type == "cuda":
        ramp = Trial(Recipe(("ramp",)), 1, data, device, graphs=True)
        for _ in range(EAGER_STEPS + 5):
            ramp.step()


def _check(recipe: Recipe, data: TrialData, device: torch.device) -> None:
    from smolctl.training.optim.optimizers import make_optimizer, set_step
    from smolctl.training.optim.schedule import learning_rate

    ours, theirs = Trial(recipe, 1, data, device), Trial(recipe, 1, data, device)
    settings, schedule = theirs.config.optimizer, theirs.config.schedule
    optimizer = make_optimizer(theirs.network, settings)

    def step_of_smolctl(*_: object) -> None:
        step = theirs.done + 1
        set_step(optimizer, settings, learning_rate(step, settings.learning_rate, schedule), step)
        optimizer.step()

    theirs.steps.step = step_of_smolctl  # type: ignore[assignment, method-assign]
    sides = {"here": ours, "smolctl": theirs}
    if device.type == "cuda":
        sides["replayed"] = Trial(recipe, 1, data, device, graphs=True)
    # On a GPU smolctl's own orthogonal factors are computed in bfloat16.
    tolerance = {"here": 0.0, "smolctl": 1e-3 if device.type == "cpu" else 2e-2, "replayed": 1e-3}
    steps = EAGER_STEPS + 5
    for name, trial in sides.items():
        started = time.perf_counter()
        for _ in range(steps):
            trial.step()
        losses = trial.losses[:steps]
        apart = float((losses - ours.losses[:steps]).abs().max())
        seconds = time.perf_counter() - started
        print(f"{recipe.name}, {name}: {losses.tolist()}, {seconds:.2f} s, at most {apart:.6f} nats apart")
        if not apart <= tolerance[name]:
            raise SystemExit(f"{recipe.name}, {name}: the losses differ")


def cost(arguments: argparse.Namespace) -> None:
    """Time a step of each lever in turns with the preset's."""
    torch.set_float32_matmul_precision("highest")
    from smolctl.training.process import keep_freed_memory

    keep_freed_memory()
    data, device = TrialData.read(arguments.data), torch.device("cpu")
    base, *others = dict.fromkeys([Recipe(("base",)), *arguments.levers])
    for recipe in others:
        works = [partial(_timed, Trial(one, 1, data, device)) for one in (base, recipe)]
        ours = in_turns(works, arguments.rounds, warmups=2)
        ratio = ratio_of(ours[1], ours[0])
        line = {"levers": list(recipe.levers), "cost": ratio.spread.median, "interval": ratio.interval}
        with arguments.costs.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
        print(json.dumps(line), flush=True)


def _timed(trial: Trial) -> float:
    """Processor seconds of a step from the middle of the run, where every lever is at work."""
    trial.done = max(trial.done, trial.recipe.steps // 3)
    started = time.process_time()
    trial.step()
    return time.process_time() - started


def judge(arguments: argparse.Namespace) -> None:
    """Print the table of all runs in the files."""
    from scipy import stats

    sizes = TrialData.read(arguments.data).sizes
    found: dict[Recipe, dict[int, Record]] = defaultdict(dict)
    for record in records(arguments.files):
        found[Recipe(tuple(record["levers"]), record["steps"])][record["seed"]] = record
    costs = {tuple(line["levers"]): line["cost"] for line in records([arguments.costs])}
    scores = {recipe: matched_score(own, found.get(PRESET, own)) for recipe, own in found.items()}
    to_steps = steps_of_base(scores)
    rows = []
    for recipe, own in found.items():
        score = mean(record["bits_per_byte"] for record in own.values())
        row: Record = {"lever": recipe.name, "seeds": len(own), "bits_per_byte": score}
        shared = sorted(set(own) & set(found.get(recipe.reference, {})))
        if recipe != recipe.reference and shared:
            pairs = [(own[seed], found[recipe.reference][seed]) for seed in shared]
            gaps = np.array([np.subtract(ours["bits"], theirs["bits"]) for ours, theirs in pairs])
            estimate = resampled_estimate(gaps, sizes)
            of_seeds = gaps.sum(1) / sizes.sum()
            row |= {"seeds": len(shared), "difference": estimate.mean, "margin": estimate.margin}
            if len(shared) > 1:
                row |= {"p": float(stats.ttest_1samp(of_seeds, 0.0).pvalue), "between_seeds": stdev(of_seeds)}
        if "eighth" not in recipe.levers:
            row["steps"] = to_steps(scores[recipe]) / recipe.steps
            row["cost"] = costs.get(recipe.levers, 1.0 if recipe.levers == ("base",) else None)
            row["time"] = row["cost"] / row["steps"] if row["cost"] else None
        rows.append(row)
    rows.sort(key=lambda row: row.get("difference") or 0.0)
    print(json.dumps(rows, indent=1) if arguments.json else table(rows))


def matched_score(own: dict[int, Record], preset: dict[int, Record]) -> float:
    """Bits per byte as the preset's seeds would give them: its mean, and the difference of shared seeds."""

    def score(of: dict[int, Record], seeds: Iterable[int]) -> float:
        return mean(float(of[seed]["bits_per_byte"]) for seed in seeds)

    shared = set(own) & set(preset)
    return score(preset, preset) + score(own, shared) - score(preset, shared) if shared else score(own, own)


def steps_of_base(scores: dict[Recipe, float]) -> Callable[[float], float]:
    """Steps that the preset needs to a loss: on a line through its two nearest runs, over log(steps)."""
    known = sorted(
        (score, math.log(recipe.steps)) for recipe, score in scores.items() if recipe.levers == ("base",)
    )

    def steps(score: float) -> float:
        if len(known) < 2:
            return math.nan
        below = min(max(1, sum(one < score for one, _ in known)), len(known) - 1)
        (a, at), (b, bt) = known[below - 1], known[below]
        return math.exp(at + (bt - at) * (score - a) / (b - a))

    return steps


def table(rows: Sequence[Record]) -> str:
    """Rows as Markdown."""
    head = [
        "lever",
        "seeds",
        "bits per byte",
        "against the preset",
        "p",
        "steps' worth",
        "cost of a step",
        "time",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        gap = f"{row['difference']:+.4f} ± {row['margin']:.4f}" if "difference" in row else ""
        p = f"{row['p']:.2g}" if "p" in row else ""
        rest = [row.get(key) for key in ("steps", "cost", "time")]
        shown = ["" if one is None or math.isnan(one) else f"{one:.3f}" for one in rest]
        lines.append([row["lever"], str(row["seeds"]), f"{row['bits_per_byte']:.4f}", gap, p, *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seeds_of(text: str) -> list[int]:
    """`1-3,7` as numbers."""
    parts = [part.split("-") for part in text.split(",")]
    return [seed for part in parts for seed in range(int(part[0]), int(part[-1]) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", choices=["prepare", "check", "run", "cost", "judge"])
    parser.add_argument("files", nargs="*", type=Path, help="judge: files of runs")
    parser.add_argument("--data", type=Path, default=Path("levers.npz"), help="the prepared corpus")
    parser.add_argument("--levers", nargs="+", default=["all"], help="names as in lever_recipes.py, or all")
    parser.add_argument("--seeds", type=seeds_of, default=[1, 2, 3], help="such as 1-8")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side, a thread each")
    parser.add_argument("--graphs", action="store_true", help="replay steps as CUDA graphs")
    parser.add_argument("--out", type=Path, default=Path("runs.jsonl"), help="run: where runs are appended")
    parser.add_argument("--costs", type=Path, default=Path("costs.jsonl"), help="where `cost` appends")
    parser.add_argument(
        "--rounds", type=int, default=9, help="cost: rounds for each lever in turns with the preset"
    )
    parser.add_argument("--json", action="store_true", help="judge: all figures as JSON")
    arguments = parser.parse_intermixed_args()
    names = [lever for name in arguments.levers for lever in (LEVERS if name == "all" else [name])]
    arguments.levers = list(dict.fromkeys(map(Recipe.parse, names)))
    works = {"check": check, "run": run, "cost": cost, "judge": judge}
    if arguments.work == "prepare":
        prepare(arguments.data)
    else:
        works[arguments.work](arguments)


if __name__ == "__main__":
    main()
