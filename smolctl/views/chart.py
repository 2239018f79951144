"""The loss of a run as a chart of characters: braille dots, or ASCII if necessary."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smolctl.runs.chart import Series, loss_range, smoothed, thinned

if TYPE_CHECKING:
    from rich.text import Text

Points = NDArray[np.float64]  # (N, 2): ascending steps, and losses

AROUND = 3  # lines above and below the curves: the legend, the axis, its labels
LEAST_LINES, LEAST_WIDTH = AROUND + 4, 30  # of a readable chart
LABEL_ROWS, LABEL_COLUMNS = 2, 10  # an axis has at most about one label per this many
MOST_LABELS = 7
# The value that a dot adds to the code of its braille character, by row and column (Unicode's U+2800 block).
BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


class Layer(NamedTuple):
    """One of the curves: its name, style, and sign in the legend with and without Unicode."""

    name: str
    style: str
    sign: str
    ascii: str


EVERY_STEP = Layer("every step", "dim", "⣿", ".")
SMOOTHED = Layer("smoothed", "bold cyan", "━", "*")
HELD_OUT = Layer("held out", "bold dark_orange", "●", "o")
LAYERS = (EVERY_STEP, SMOOTHED, HELD_OUT)  # later ones are in front


def loss_chart(
    losses: Points, held_out: Points, width: int, height: int, ascii_only: bool = False
) -> list[Text]:
    """The loss of every step behind its smoothed curve, and the held-out losses, by step.

    Args:
        losses: of at least two steps.
        held_out: may be empty.
        width: columns per line, at least `LEAST_WIDTH`.
        height: lines, at least `LEAST_LINES`.
        ascii_only: draw without braille and box characters.
    """
    from rich.text import Text

    x, raw = thinned(losses[:, 0]), thinned(losses[:, 1])
    smooth = smoothed(raw)
    (left, right), (low, high) = losses[[0, -1], 0], loss_range(raw, held_out[:, 1])
    rows = height - AROUND
    y_ticks = ticks(low, high, rows // LABEL_ROWS)
    margin = max((len(name) for _, name in y_ticks), default=0)
    columns = width - margin - 2
    x_ticks = ticks(left, right, columns // LABEL_COLUMNS, whole=True)
    y_labels = {_cell((high - value) / (high - low), rows): name for value, name in y_ticks}
    x_labels = {_cell((value - left) / (right - left), columns): name for value, name in x_ticks}

    def shares(steps: Series, values: Series) -> tuple[Series, Series]:
        """Points as shares of the width (from the left) and the height (from the top)."""
        return (steps - left) / (right - left), (high - values) / (high - low)

    layers = [shares(x, raw), shares(x, smooth), shares(held_out[:, 0], held_out[:, 1])]
    upright, tick, corner, level, notch = tuple("|++-+" if ascii_only else "│┤└─┬")
    lines = [_legend((losses[-1, 1], smooth[-1], *held_out[-1:, 1]), ascii_only)]
    for row, cells in enumerate(_cells(layers, columns, rows, ascii_only)):
        name = y_labels.get(row, "")
        lines.append(Text(f"{name:>{margin}} {tick if name else upright}", style="dim") + cells)
    axis = "".join(notch if column in x_labels else level for column in range(columns))
    lines.append(Text(f"{'':{margin}} {corner}{axis}", style="dim"))
    lines.append(Text(_below(x_labels, margin + 2, width), style="dim"))
    return lines


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[tuple[float, str]]:
    """About `most` round values (1, 2 or 5 times a power of ten) from low to high, and their texts.

    Args:
        low: of the axis.
        high: of the axis, above `low`.
        most: values; no more than `MOST_LABELS`.
        whole: use integers only.
    """
    least = (high - low) / max(1, min(most, MOST_LABELS))
    power = 10.0 ** math.floor(math.log10(least))
    unit = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * 0.999)
    unit = max(1.0, unit) if whole else unit
    digits = max(0, -math.floor(math.log10(unit) + 1e-9))
    form = f",.{digits}f" if max(-low, high) < 1e9 else ".2g"
    numbers = range(math.ceil(low / unit), math.floor(high / unit) + 1)
    return [(number * unit, format(number * unit, form)) for number in numbers]


def _cells(layers: list[tuple[Series, Series]], columns: int, rows: int, ascii_only: bool) -> list[Text]:
    """Two curves and marks on a canvas of characters, later ones in front."""
    from rich.text import Text

    across, down = (1, 1) if ascii_only else (2, 4)  # dots per character
    characters = np.full((rows, columns), " ", dtype="<U1")
    front = np.full((rows, columns), -1)
    for number, (x, y) in enumerate(layers[:2]):
        dots = _curve(x * (columns * across - 1), y * (rows * down - 1), columns * across, rows * down)
        blocks = dots.reshape(rows, down, columns, across).transpose(0, 2, 1, 3)
        drawn = blocks.any((2, 3))
        codes = 0x2800 + (blocks * BRAILLE[:down, :across]).sum((2, 3))
        signs = LAYERS[number].ascii if ascii_only else np.vectorize(chr, otypes=["<U1"])(codes)
        characters = np.where(drawn, signs, characters)
        front[drawn] = number
    x, y = layers[-1]
    seen = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    for x_share, y_share in zip(x[seen], y[seen], strict=True):
        at = _cell(y_share, rows), _cell(x_share, columns)
        characters[at] = HELD_OUT.ascii if ascii_only else HELD_OUT.sign
        front[at] = len(LAYERS) - 1

    def line(row: int) -> Text:
        text = Text()
        for number, run in groupby(range(columns), lambda column: front[row, column]):
            style = LAYERS[number].style if number >= 0 else ""
            text.append("".join(characters[row, column] for column in run), style)
        return text

    return [line(row) for row in range(rows)]


def _cell(share: float, cells: int) -> int:
    """The cell at a share (0 to 1) of an axis."""
    return min(cells - 1, int(share * cells))


def _curve(x: Series, y: Series, columns: int, rows: int) -> NDArray[np.bool_]:
    """The dots (rows, columns) of a curve: in each column from its lowest point to its highest, extended to
    touch the previous column. Points outside are not drawn.
    """
    top = np.interp(np.arange(columns), x, y)
    bottom = top.copy()
    column = np.rint(x).astype(int)
    np.minimum.at(top, column, y)
    np.maximum.at(bottom, column, y)
    top[1:], bottom[1:] = np.minimum(top[1:], bottom[:-1]), np.maximum(bottom[1:], top[:-1])
    row = np.arange(rows)[:, None]
    return (np.rint(top) <= row) & (row <= np.rint(bottom))


def _legend(last: tuple[float, ...], ascii_only: bool) -> Text:
    from rich.text import Text

    text = Text("loss in nats", style="dim")
    for layer, value in zip(LAYERS, last, strict=False):
        text.append(f"   {layer.ascii if ascii_only else layer.sign} ", layer.style)
        text.append(f"{layer.name} {value:.4f}")
    return text


def _below(labels: dict[int, str], margin: int, width: int) -> str:
    """Labels centred below their columns, and the name of the axis."""
    line = "step"
    for column, name in labels.items():
        start = min(margin + column - len(name) // 2, width - len(name))
        if start > len(line):
            line = f"{line:{start}}{name}"
    return line
