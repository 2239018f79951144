"""Progress of tokenization: a bar on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from smolctl.data.tokens.corpus import TokenizeProgress
from smolctl.views.numbers import duration, quantity, size
from smolctl.views.output import Output

if TYPE_CHECKING:
    from rich.progress import Progress

# Without a terminal, minimum seconds between progress lines.
PLAIN_INTERVAL = 5.0
NAME = "Tokenizing"


class TokenizingView:
    """Shows the progress of tokenization; `close` leaves the bar on the screen."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self._bar: Progress | None = None
        self._first = self._last = TokenizeProgress()
        self._opened = self._last_line = 0.0

    def __call__(self, progress: TokenizeProgress) -> None:
        """Update the progress. Each source of a mixture starts again."""
        if self.out.quiet or self.out.json:
            return
        now = time.monotonic()
        if self.out.stderr.is_interactive:
            if self._bar is None or progress.bytes_read < self._last.bytes_read:
                self.close()
                self._bar, self._first, self._opened = self._open(), progress, now
            rate = (progress.bytes_read - self._first.bytes_read) / max(1e-9, now - self._opened)
            self._bar.update(
                self._bar.task_ids[0],
                completed=progress.bytes_read,
                total=progress.bytes_total,
                described=", ".join(_described(progress, rate)),
            )
        elif now - self._last_line >= PLAIN_INTERVAL:
            self._last_line = now
            self.out.message(f"{NAME}: {', '.join(_described(progress, 0))}")
        self._last = progress

    def close(self) -> None:
        """Finish the bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open(self) -> Progress:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        from rich.table import Column

        bar = Progress(
            TextColumn(NAME),
            BarColumn(None, complete_style="cyan", finished_style="cyan"),
            TaskProgressColumn(),
            TextColumn("{task.fields[described]}", markup=False, table_column=Column(no_wrap=True)),
            console=self.out.stderr,
            expand=True,
            redirect_stdout=False,
        )
        bar.add_task("", described="")
        bar.start()
        return bar


def _described(progress: TokenizeProgress, rate: float) -> list[str]:
    """The text read, the resulting tokens, and, with a rate in bytes per second, the remaining time."""
    total = progress.bytes_total
    described = [
        size(progress.bytes_read) + (f" of {size(total)}" if total else ""),
        f"{quantity(progress.tokens)} tokens",
    ]
    if rate > 0:
        described.append(f"{size(rate)}/s")
        if total and total > progress.bytes_read:
            described.append(f"{duration((total - progress.bytes_read) / rate)} left")
    return described
