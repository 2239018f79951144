"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]

POINTS = 4_000  # of a line at most: the picture has fewer columns, and the drawing library a limit
SMOOTHED_SHARE = 0.05  # of the run, over which a point of the smooth line averages
FIRST_SHARE = 0.05  # of the run, whose high losses may exceed the top of the picture
SETTLING = 100  # number of losses from which this applies


@dataclass(frozen=True)
class Losses:
    """The losses of a run, cross-entropies in nats per token, with their steps."""

    steps: Series  # (N,)
    losses: Series  # (N,)
    z_losses: Series  # (N,), 0 without z-loss
    held_out_steps: Series  # (M,)
    held_out: Series  # (M,)
    bits_per_byte: float | None  # of the last validation


def losses_of(records: Iterable[Mapping[str, Any]]) -> Losses:
    """The losses in the records of metrics.jsonl; steps with a float16 overflow have none."""
    training, held_out, bits = [], [], None
    for record in records:
        if record["loss"] is None:
            continue
        if record["event"] == "step":
            training.append((record["step"], record["loss"], record.get("z_loss") or 0.0))
        elif record["event"] == "validation":
            held_out.append((record["step"], record["loss"]))
            bits = record["bits_per_byte"]
    steps, losses, z_losses = np.array(training, dtype=float).reshape(-1, 3).T
    checks, scores = np.array(held_out, dtype=float).reshape(-1, 2).T
    return Losses(steps, losses, z_losses, checks, scores, bits)


def draw_loss(records: Iterable[Mapping[str, Any]], target: Path) -> None:
    """Draw the training loss, a smooth line through it, and the held-out loss into a PNG.

    The losses are cross-entropies. A z-loss is drawn as a separate line with its own axis.

    Args:
        records: of metrics.jsonl, in order of steps.
        target: the file, whatever its suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found = losses_of(records)
    x, raw, z_losses = thinned(found.steps), thinned(found.losses), found.z_losses
    smooth = smoothed(raw)

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    width = 0.80 if z_losses.any() else 0.88
    axes = figure.add_axes((0.105, 0.115, width, 0.865))  # computing a layout takes twice the time
    axes.plot(x, raw, color="#9ecae1", linewidth=0.8, label="training")
    axes.plot(x, smooth, color="#08519c", linewidth=1.6, label="training, smoothed")
    if found.held_out.size:
        label = f"held out, last {found.bits_per_byte:.4f} bits/byte"
        axes.plot(found.held_out_steps, found.held_out, "o-", color="#d94801", markersize=4, label=label)
    if z_losses.any():
        beside = axes.twinx()
        beside.plot(x, smoothed(thinned(z_losses)), color="#74c476", linewidth=1)
        beside.set_ylabel("z-loss (nats per token)")
        beside.spines["top"].set_visible(False)
        axes.plot([], [], color="#74c476", linewidth=1, label="z-loss, right axis")
    if len(raw):
        axes.set_ylim(loss_range(raw, found.held_out))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target, format="png", dpi=120)


def loss_range(raw: Series, held_out: Sequence[float] | Series) -> tuple[float, float]:
    """The lowest and the highest loss of a picture; with 100 losses or more, the first may exceed the top.

    Args:
        raw: training losses (N,), at least one.
        held_out: losses (M,), perhaps none.
    """
    settled = raw[round(FIRST_SHARE * len(raw)) :] if len(raw) >= SETTLING else raw
    low, high = min([settled.min(), *held_out]), max([settled.max(), *held_out])
    scale = max(1.0, abs(low), abs(high))
    margin = 0.05 * (high - low) if high - low > 1e-3 * scale else 0.1 * scale  # a flat line, centred
    return low - margin, high + margin


def thinned(values: Series, most: int = POINTS) -> Series:
    """A series (N,) as at most `most` means of consecutive values."""
    if len(values) <= most:
        return values
    edges = np.linspace(0, len(values), most + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def smoothed(values: Series, share: float = SMOOTHED_SHARE) -> Series:
    """The moving average of a series (N,) over `share` of it; over less near the start, where a loss falls
    fast.
    """
    at = np.arange(len(values))
    reach = np.minimum(at // 4, round(share * len(values) / 2))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    first, end = at - reach, np.minimum(at + reach + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)
