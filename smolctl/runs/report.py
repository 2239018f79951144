"""report.html: a run on one page, for a browser without a network connection.

The page is self-contained and runs no script. Text from models and users is escaped, and the page's content
security policy forbids whatever could be loaded if escaping failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smolctl import __version__
from smolctl.arithmetic import count_parameters
from smolctl.config import RunConfig
from smolctl.config.dump import to_yaml
from smolctl.escaping import for_terminal, json_text, whole_characters
from smolctl.runs.chart import Losses, Series, loss_range, losses_of, smoothed, thinned
from smolctl.runs.prediction_history import History, selection
from smolctl.runs.records import best_validation
from smolctl.timing import with_error

if TYPE_CHECKING:
    import jinja2

TEMPLATE = Path(__file__).parent / "report.html.jinja"
POINTS = 500  # of a line: the picture is 720 wide
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 720, 320, 52, 44, 12  # of the picture and of the area around its curves
SHOWN_PREDICTIONS = 12  # for each prompt, including the first and the last


@dataclass(frozen=True)
class LossPicture:
    """The loss curve as coordinates of an SVG."""

    training: str  # points of polylines
    smooth: str
    held_out: tuple[tuple[float, float], ...]
    steps: tuple[tuple[float, str], ...]  # axis marks: position and text
    losses: tuple[tuple[float, str], ...]


def to_html(
    name: str,
    config: RunConfig,
    records: Iterable[Mapping[str, Any]],
    predictions: Mapping[str, History],
    environment: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        name: of the run.
        config: its settings.
        records: of metrics.jsonl, in order of steps.
        predictions: by prompt.
        environment: the machine and the versions.
    """
    records = list(records)
    steps = [record for record in records if record["event"] == "step"]
    validations = [record for record in records if record["event"] == "validation"]
    return _template().render(
        name=name,
        version=__version__,
        config=config,
        yaml=to_yaml(config),
        environment=json_text(environment, indent=2),
        parameters=count_parameters(config.model).unique,
        last=steps[-1] if steps else None,
        minutes=sum(record["seconds"] for record in steps) / 60,
        validations=validations,
        best=best_validation(validations),
        predictions={
            prompt: selection(history, SHOWN_PREDICTIONS) for prompt, history in predictions.items()
        },
        picture=_picture(losses_of(records)),
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "bottom": BOTTOM, "margin": MARGIN},
    )


@cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "visible": lambda text: for_terminal(whole_characters(text)),
        "number": lambda value, form: "–" if value is None else format(value, form),
        "bits": lambda record: with_error(record["bits_per_byte"], record["standard_error"]),
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _picture(losses: Losses) -> LossPicture | None:
    """The loss curve; None if no step has a loss."""
    from matplotlib.ticker import MaxNLocator

    if not losses.losses.size:
        return None
    raw, steps = thinned(losses.losses, POINTS), np.append(losses.steps, losses.held_out_steps)
    first, last = float(steps.min()), float(steps.max())
    low, high = loss_range(raw, losses.held_out)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / max(1, last - first) * (WIDTH - LEFT - MARGIN), 1)

    def y(loss: float) -> float:
        shown = min(loss, 2 * high - low)  # the first losses may exceed the top of the picture
        return round(MARGIN + (high - shown) / (high - low) * (HEIGHT - BOTTOM - MARGIN), 1)

    def line(values: Series) -> str:
        points = zip(thinned(losses.steps, POINTS), values, strict=True)
        return " ".join(f"{x(step)},{y(loss)}" for step, loss in points)

    def marks(lowest: float, highest: float, whole: bool) -> list[float]:
        found = MaxNLocator(6, integer=whole, steps=[1, 2, 5, 10]).tick_values(lowest, highest)
        return [value for value in found if lowest <= value <= highest]

    return LossPicture(
        training=line(raw),
        smooth=line(smoothed(raw)),
        held_out=tuple(
            (x(step), y(loss)) for step, loss in zip(losses.held_out_steps, losses.held_out, strict=True)
        ),
        steps=tuple((x(step), f"{step:,.0f}") for step in marks(first, last, True)),
        losses=tuple((y(loss), f"{loss:g}") for loss in marks(low, high, False)),
    )
