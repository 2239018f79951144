"""Numbers in a readable form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_BARS = "▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 10 min, 12 days 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days:,} days {hours} h"


def size(count: float) -> str:
    """512 B, 38.9 MB, 1.62 GB: powers of 1,000, as for disks."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def quantity(count: float) -> str:
    """950, 12.3 k, 3.2 M, 1.05 G."""
    for unit in ("", " k", " M", " G"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g} T"


def counted(count: int, name: str) -> str:
    """1 checkpoint, 2 checkpoints."""
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"


def figure(value: float) -> str:
    """12,345, 123, 0.0123: three significant digits, and all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    """43.2 %, < 0.1 %, 0.0 %."""
    return f"{100 * share:.1f} %" if share >= 0.0005 or not share else "< 0.1 %"


def sparkline(values: Sequence[float], width: int, low: float | None = None) -> str:
    """A series as a row of bars, each the mean of an interval, scaled from `low` or the minimum to the
    maximum.
    """
    if not values or width < 1:
        return ""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means) if low is None else low, max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)
