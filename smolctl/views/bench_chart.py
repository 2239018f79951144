"""A bench as a chart with a panel for each suite and a bar for each engine."""

from __future__ import annotations

from pathlib import Path

from smolctl.benchmark.report import BenchReport
from smolctl.durable import replacing
from smolctl.errors import SmolError

COLUMNS = 3  # of panels
WRITER = "smolctl bench"
OURS, THEIRS = "#08519c", "#9ecae1"


def is_own_chart(path: Path) -> bool:
    """Whether `draw_bench` has written a file."""
    with path.open("rb") as file:
        return WRITER.encode() in file.read(1024)


def draw_bench(report: BenchReport, target: Path) -> None:
    """Draw medians with the range of the repeats to a PNG.

    Raises:
        SmolError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    suites = list(dict.fromkeys(result.suite for result in report.results))
    columns = max(1, min(COLUMNS, len(suites)))
    lines = max(1, -(-len(suites) // columns))
    most = max((sum(one.suite == suite for one in report.results) for suite in suites), default=1)
    figure = Figure(figsize=(4.2 * columns, lines * (1.0 + 0.32 * most)), layout="constrained")
    for number, suite in enumerate(suites, 1):
        shown = [one for one in report.results if one.suite == suite]
        axes = figure.add_subplot(lines, columns, number)
        names = [f"{one.engine} {one.precision}" for one in shown]
        medians = [one.median for one in shown]
        around = [[one.median - one.min for one in shown], [one.max - one.median for one in shown]]
        colors = [OURS if one.engine == "smolctl" else THEIRS for one in shown]
        axes.barh(range(len(shown)), medians, xerr=around, color=colors, ecolor="#555555", capsize=2)
        axes.set_yticks(range(len(shown)), names, fontsize=8)
        axes.invert_yaxis()
        better = "more is better" if "/" in shown[0].unit else "less is better"
        axes.set_title(f"{suite}: {shown[0].unit}, {better}", fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{report.model.id} on {report.machine.cpu}, {report.machine.threads} threads", fontsize=9
    )
    try:
        with replacing(target) as partial:
            figure.savefig(partial, format="png", dpi=120, metadata={"Software": WRITER})
    except OSError as error:
        raise SmolError(
            f"{target}: the chart cannot be written ({error.strerror})", "Name another file with --plot."
        ) from None
