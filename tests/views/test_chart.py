"""The chart of a loss: the right size, the right labels, the right place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from smolctl.views.chart import LEAST_LINES, LEAST_WIDTH, Points, loss_chart, ticks

NONE = np.empty((0, 2))


def series(*losses: float, first: int = 1) -> Points:
    return np.array([(step, loss) for step, loss in enumerate(losses, first)])


def drawn(losses: Points, held_out: Points, width: int, height: int, ascii_only: bool = False) -> list[str]:
    return [line.plain for line in loss_chart(losses, held_out, width, height, ascii_only)]


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(("width", "height"), [(80, 10), (140, 28), (LEAST_WIDTH, LEAST_LINES), (200, 60)])
def test_it_fills_its_lines_whatever_their_number(width: int, height: int, ascii_only: bool) -> None:
    losses = series(*(8 / step**0.2 for step in range(1, 500)))
    lines = drawn(losses, losses[99::100], width, height, ascii_only)
    assert len(lines) == height
    assert cell_len(lines[-2]) == width  # the axis
    assert all(cell_len(line) <= width for line in lines[1:])
    assert all(line.isascii() == ascii_only for line in (lines[0], lines[-2]))
    assert "".join(lines).isascii() == ascii_only


def test_the_legend_says_what_is_drawn_and_how_it_stands() -> None:
    legend = drawn(series(5, 4, 3), np.array([(2, 4.25)]), 80, 12)[0]
    assert [part in legend for part in ("every step 3.0000", "smoothed", "held out 4.2500")] == [True] * 3
    assert "held out" not in drawn(series(5, 4, 3), NONE, 80, 12)[0]


def test_labels_stand_beside_what_they_name() -> None:
    """A straight line from 5 at step 1 to 2.5 at step 1,001 is at 4 where the step is 401."""
    lines = drawn(series(*np.linspace(5, 2.5, 1_001)), NONE, 140, 30)
    axis, labels = lines[-2], lines[-1]
    row = next(line for line in lines if line.startswith("4.0"))
    column = axis.index("┬", labels.index("400") - 1)
    assert row[column - 2 : column + 3].strip()
    assert not row[column - 20 : column - 10].strip()
    assert labels.split() == ["step", "200", "400", "600", "800", "1,000"]


def test_a_falling_loss_falls_and_held_out_losses_lie_where_they_belong() -> None:
    lines = drawn(series(*np.linspace(5, 3, 90)), np.array([(1, 5.0), (90, 3.0)]), 60, 20)
    marked = [number for number, line in enumerate(lines[1:], 1) if "●" in line]
    assert len(marked) == 2
    assert lines[marked[0]].index("●") < 6
    assert lines[marked[1]].index("●") == 59
    assert marked[0] < 4
    assert marked[1] > 14


def test_the_first_losses_of_a_long_run_may_leave_it_at_the_top() -> None:
    lines = drawn(series(*[1_000.0] * 5, *np.linspace(5, 3, 500)), NONE, 80, 20)
    assert any(line.startswith("4") for line in lines)


@given(
    st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=300),
    st.integers(1, 10**9),
    st.integers(LEAST_WIDTH, 250),
    st.integers(LEAST_LINES, 70),
    st.booleans(),
)
def test_no_losses_break_it(
    losses: list[float], first: int, width: int, height: int, ascii_only: bool
) -> None:
    points = series(*losses, first=first)
    lines = drawn(points, points[::50], width, height, ascii_only)
    assert len(lines) == height
    assert all(cell_len(line) <= width for line in lines[1:])


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e6), st.integers(1, 100))
def test_ticks_are_round_and_between_the_ends(low: float, span: float, most: int) -> None:
    found = ticks(low, low + span, most)
    assert len(found) <= 9
    for value, name in found:
        assert low - 1e-6 * span <= value <= low + span * (1 + 1e-6)
        assert float(name.replace(",", "")) == pytest.approx(value, abs=1e-9)
