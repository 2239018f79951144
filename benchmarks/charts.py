"""Draws the results in benchmarks/results.

python benchmarks/train_step.py > benchmarks/results/train_step.json
python benchmarks/train_step.py --compiled > benchmarks/results/train_step_compiled.json
python benchmarks/time_to_loss.py ... >> benchmarks/results/time_to_loss.jsonl
python benchmarks/charts.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
plt.rcParams.update({"figure.constrained_layout.use": True, "savefig.dpi": 110})
RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
OURS, THEIRS = "#2a6f97", "#b0b0b0"


def draw_train_step() -> None:
    """Speed and memory of every engine, those of smolctl from all of its duels."""
    duels = [
        duel
        for name in ("train_step.json", "train_step_compiled.json")
        for duel in json.loads((RESULTS / name).read_text())["duels"]
    ]
    labels = ["smolctl", *(duel["sides"][1] for duel in duels)]
    # Relative to smolctl in the same rounds: speeds of different minutes compare badly.
    speeds = [1.0, *(1 / duel["speed_ratio"]["spread"]["median"] for duel in duels)]
    memory = [1.0, *(1 / duel["memory_ratio"] for duel in duels)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for axis, values, title in zip(axes, (speeds, memory), ("speed", "peak memory"), strict=True):
        bars = axis.barh(labels, values, color=[OURS, *[THEIRS] * len(duels)])
        axis.bar_label(bars, fmt="%.2f", padding=2)
        axis.set_title(f"{title}, smolctl = 1")
        axis.margins(x=0.12)
    axes[0].invert_yaxis()
    figure.savefig(IMAGES / "train_step.png")


def draw_time_to_loss() -> None:
    """Bits per byte of every trial against the seconds of its steps."""
    rows = [json.loads(line) for line in (RESULTS / "time_to_loss.jsonl").read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for optimizer, color in (("muon", OURS), ("adamw", THEIRS)):
        for sequences, marker in ((8, "o"), (4, "s")):
            chosen = [row for row in rows if (row["optimizer"], row["sequences"]) == (optimizer, sequences)]
            axis.errorbar(
                [row["steps"] * row["step_seconds"] for row in chosen],
                [row["bits_per_byte"] for row in chosen],
                [row["standard_error"] for row in chosen],
                fmt=marker,
                color=color,
                capsize=2,
                label=f"{optimizer}, {sequences} sequences a step",
            )
    axis.set_xlim(left=0)
    axis.set_xlabel("seconds of steps on two cores")
    axis.set_ylabel("held-out bits per byte")
    axis.legend()
    figure.savefig(IMAGES / "time_to_loss.png")


def draw_comparison() -> None:
    """How many times as fast smolctl is as each program, with the range of the rounds."""
    rows = json.loads((RESULTS / "comparison.json").read_text())[::-1]
    figure, axis = plt.subplots(figsize=(9, 7.2))
    for place, row in enumerate(rows):
        axis.plot([row["low"], row["high"]], [place, place], color=OURS, linewidth=3, alpha=0.4)
        axis.plot(row["ratio"], place, "o", color=OURS)
        axis.annotate(
            f"{row['ratio']:.2f}",
            (row["ratio"], place),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axis.axvline(1, color="#666666", linewidth=1)
    axis.set_xscale("log")
    axis.set_xticks(ticks := [0.75, 1, 1.5, 2, 3, 5, 10], [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(rows)), [f"{row['what']}\nvs. {row['against']}" for row in rows], fontsize=8)
    axis.set_xlabel("times as fast (log scale); bars: range of the rounds")
    figure.savefig(IMAGES / "comparison.png")


if __name__ == "__main__":
    draw_train_step()
    draw_time_to_loss()
    draw_comparison()
