"""Which validation of a run was the best, and when a run has waited long enough for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """What the validations at multiples of `validation.every` have found so far; kept in every checkpoint.

    Those alone count: where a run is interrupted or extended changes nothing about them.
    """

    step: int = 0  # of the last one
    best_step: int = 0  # of the one with the fewest bits per byte
    bits_per_byte: float = math.inf  # of that one
    since: int = 0  # validations after it
    tokens: int = 0  # that each of them has scored; 0: not recorded

    def on_text(self, tokens: int) -> Progress:
        """The progress on this many held-out tokens: scores of other text, as of a run that was resumed with
        another validation.sequences, cannot be compared with theirs.
        """
        if self.tokens in (0, tokens):
            return replace(self, tokens=tokens)
        return Progress(self.step, tokens=tokens)

    def is_improved_by(self, bits_per_byte: float) -> bool:
        """Whether a score is better than all of these."""
        return bits_per_byte < self.bits_per_byte

    def after(self, step: int, bits_per_byte: float) -> Progress:
        """The progress when one more validation, at `step`, has given a score."""
        if self.is_improved_by(bits_per_byte):
            return Progress(step, step, bits_per_byte, tokens=self.tokens)
        return replace(self, step=step, since=self.since + 1)
