"""rich's console for untrusted text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from smolctl.escaping import for_terminal


class PlainConsole(Console):
    """Prints strings literally: without markup or emoji names, and without control sequences for the
    terminal. rich's own control sequences are passed on.

    Args:
        options: see `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    @property
    def file(self) -> IO[str]:
        """The original stream, below wrappers that translate or redirect output."""
        file = super().file
        while (below := getattr(file, "rich_proxied_file", None)) is not None:
            file = below
        return file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, because the command decides what a closed pipe means; rich would exit
        with 1.
        """
        raise BrokenPipeError

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """The segments of any printable object; all output passes through here."""
        obeys = self.is_terminal
        for segment in super().render(renderable, options):
            if segment.control or not obeys:
                yield segment
                continue
            style = segment.style
            if style and style.link:  # rich reads links from text that libraries print next to a progress bar
                style = style.update_link()
            yield Segment(for_terminal(segment.text), style)
