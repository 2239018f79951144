"""The best validation of a run, and whether the run has waited long enough for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """The results of the validations at multiples of `validation.every` so far; stored in every checkpoint.

    Other validations do not count, so interrupting or extending a run does not change the result.
    """

    step: int = 0  # of the last validation
    best_step: int = 0  # of the validation with the lowest bits per byte
    bits_per_byte: float = math.inf  # of that validation
    since: int = 0  # number of later validations
    tokens: int = 0  # scored by each of them; 0: not recorded

    def on_text(self, tokens: int) -> Progress:
        """The progress on this many held-out tokens: scores of other text, as after a resume with another
        validation.sequences, cannot be compared.
        """
        if self.tokens in (0, tokens):
            return replace(self, tokens=tokens)
        return Progress(self.step, tokens=tokens)

    def is_improved_by(self, bits_per_byte: float) -> bool:
        """Whether a score is better than all of these."""
        return bits_per_byte < self.bits_per_byte

    def after(self, step: int, bits_per_byte: float) -> Progress:
        """The progress after one more validation, at `step`, with this score."""
        if self.is_improved_by(bits_per_byte):
            return Progress(step, step, bits_per_byte, tokens=self.tokens)
        return replace(self, step=step, since=self.since + 1)
