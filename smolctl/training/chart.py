"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_loss(records: Sequence[dict[str, Any]], target: Path) -> None:
    """Draw training loss, its running mean and the validation loss over the steps into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [record for record in records if record["event"] == "step"]
    checks = [record for record in records if record["event"] == "validation"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x = [record["step"] for record in steps]
    losses = [record["loss"] for record in steps]
    axes.plot(x, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
    axes.plot(x, running_mean(losses), color="#08519c", linewidth=1.6, label="training, running mean")
    if checks:
        axes.plot(
            [record["step"] for record in checks],
            [record["loss"] for record in checks],
            "o-",
            color="#d94801",
            markersize=4,
            label="held out",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, format="png", dpi=120)


def running_mean(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Exponential mean whose memory is `share` of the series, without a bias at its beginning."""
    keep = 1 - 1 / max(1.0, share * len(values))
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return smooth
