"""Tokens of one or several sources, and the choice of tokens for each sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smolctl.data.order import (
    MIXTURE,
    sources_of_samples,
    starts_of_samples,
    window_count,
    windows_of_samples,
)
from smolctl.data.tokens.shards import TokenStream


class Window(NamedTuple):
    """The position of a window in a mixture."""

    part: int  # number of the source
    start: int  # its first token in that source


@dataclass(frozen=True)
class Part:
    """One source's tokens.

    Attributes:
        tokens: of all its documents.
        share: samples from it in every `MIXTURE` samples.
        block: number of windows that are shuffled among themselves; None: all of them.
        aligned: whether windows begin only at multiples of their length, as for packed conversations.
        repeats: whether the first token follows the last one; a partly read stream continues instead.
    """

    tokens: TokenStream
    share: int = MIXTURE
    block: int | None = None
    repeats: bool = True
    aligned: bool = False

    def starts(self, samples: NDArray[np.int64], sequence_length: int, seed: int) -> NDArray[np.int64]:
        """First tokens (n,) of the windows of the part's own samples (n,).

        Raises:
            IndexError: more windows are requested than were streamed.
        """
        if self.repeats and not self.aligned:
            return starts_of_samples(samples, len(self.tokens), sequence_length, seed, self.block)
        count = window_count(len(self.tokens), sequence_length)
        if not self.repeats and len(samples) and samples.max() >= count:
            raise IndexError(f"sample {samples.max()} of a stream of which {count} sequences were read")
        return windows_of_samples(samples, count, seed, self.block) * sequence_length


@dataclass(frozen=True)
class Mixture:
    """The parts from which samples are drawn."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        """Total tokens of all parts."""
        return sum(len(part.tokens) for part in self.parts)

    def windows(self, samples: NDArray[np.int64], sequence_length: int, seed: int) -> list[Window]:
        """The window of each of the run's samples (n,): a pure function of the arguments."""
        if len(self.parts) == 1:
            sources, numbers = np.zeros_like(samples), samples
        else:
            sources, numbers = sources_of_samples(samples, [part.share for part in self.parts], seed)
        chosen = np.empty_like(samples)
        for index, part in enumerate(self.parts):
            here = sources == index
            chosen[here] = part.starts(numbers[here], sequence_length, seed)
        return [Window(int(part), int(start)) for part, start in zip(sources, chosen, strict=True)]

    def describe(self, window: Window) -> str:
        """A window in words: its first token, and its source if there are several."""
        source = f" of source {window.part + 1}" if len(self.parts) > 1 else ""
        return f"{window.start:,}{source}"

    def read(self, window: Window, sequence_length: int) -> NDArray[np.int64]:
        """Tokens (sequence_length + 1,) of a window; after the last token of the part, its first one
        follows.
        """
        stream = self.parts[window.part].tokens
        before = min(sequence_length + 1, len(stream) - window.start)  # up to the end
        tokens = stream.read(window.start, before)
        if before == sequence_length + 1:
            return tokens
        return np.concatenate([tokens, stream.read(0, sequence_length + 1 - before)])
