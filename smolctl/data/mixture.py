"""Tokens of one or several sources, and which of them a sample reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smolctl.data.order import MIXTURE, sources_of_samples, window_count, windows_of_samples
from smolctl.data.tokens.shards import TokenStream


class Window(NamedTuple):
    """A window's place in a mixture."""

    part: int  # number of the source
    number: int  # of the window in it


@dataclass(frozen=True)
class Part:
    """One source's tokens.

    Attributes:
        tokens: of all its documents.
        share: samples from it in every `MIXTURE` samples.
        block: windows that are shuffled among themselves; None: all of them.
        repeats: whether a new pass begins at the end; a stream that was not read to its end goes on there.
    """

    tokens: TokenStream
    share: int = MIXTURE
    block: int | None = None
    repeats: bool = True

    def windows(self, samples: NDArray[np.int64], sequence_length: int, seed: int) -> NDArray[np.int64]:
        """Window numbers (n,) of the part's own samples (n,).

        Raises:
            IndexError: more windows are asked for than were streamed.
        """
        count = window_count(len(self.tokens), sequence_length)
        if not self.repeats and len(samples) and samples.max() >= count:
            raise IndexError(f"sample {samples.max()} of a stream of which {count} sequences were read")
        return windows_of_samples(samples, count, seed, self.block)


@dataclass(frozen=True)
class Mixture:
    """The parts that samples are drawn from."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        """Tokens of all parts."""
        return sum(len(part.tokens) for part in self.parts)

    def windows(self, samples: NDArray[np.int64], sequence_length: int, seed: int) -> list[Window]:
        """Where each of the samples (n,) of the run comes from: a pure function of the arguments."""
        if len(self.parts) == 1:
            sources, numbers = np.zeros_like(samples), samples
        else:
            sources, numbers = sources_of_samples(samples, [part.share for part in self.parts], seed)
        chosen = np.empty_like(samples)
        for index, part in enumerate(self.parts):
            here = sources == index
            chosen[here] = part.windows(numbers[here], sequence_length, seed)
        return [Window(int(part), int(number)) for part, number in zip(sources, chosen, strict=True)]

    def describe(self, window: Window) -> str:
        """A window in words: its number, and its source where there are several."""
        source = f" of source {window.part + 1}" if len(self.parts) > 1 else ""
        return f"{window.number:,}{source}"

    def read(self, window: Window, sequence_length: int) -> NDArray[np.int64]:
        """Tokens (sequence_length + 1,) of a window."""
        stream = self.parts[window.part].tokens
        return stream.read(window.number * sequence_length, sequence_length + 1)
