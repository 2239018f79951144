"""rich's console, for text that anybody may have written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from smolctl.escaping import for_terminal


class PlainConsole(Console):
    """Prints strings as they are: they have no markup and no names of emoji, and a terminal obeys none of
    their characters. What rich itself has to say to the terminal passes.

    Args:
        options: see `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    @property
    def file(self) -> IO[str]:
        """The stream itself, below those that translate or redirect what others write."""
        file = super().file
        while (below := getattr(file, "rich_proxied_file", None)) is not None:
            file = below
        return file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError: the command decides what a closed pipe means; rich would exit with 1."""
        raise BrokenPipeError

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """The pieces of text of anything that can be printed; all that is printed comes through here."""
        obeys = self.is_terminal
        for segment in super().render(renderable, options):
            if segment.control or not obeys:
                yield segment
                continue
            style = segment.style
            if style and style.link:  # rich reads links from what libraries print beside a progress bar
                style = style.update_link()
            yield Segment(for_terminal(segment.text), style)
