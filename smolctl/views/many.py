"""Completions of many prompts as lines of JSON in the order of the input, with progress beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from smolctl.generation.answer import Completion
from smolctl.views.output import Output
from smolctl.views.samples import completion_json

EVERY_S = 5.0  # seconds between two lines of progress


class ManyView:
    """Prints a line as soon as all lines before it are printed.

    Args:
        out: where to; lines of data go to stdout, whatever else was asked for.
        inputs: the objects of the input; their fields come back, the completions beside them.
    """

    def __init__(self, out: Output, inputs: Sequence[Mapping[str, Any]]) -> None:
        self.out, self.inputs = out, inputs
        self.started = self.said = time.perf_counter()
        self.done = self.tokens = self._printed = 0
        self._waiting: dict[int, tuple[Completion, ...]] = {}

    def __call__(self, index: int, completions: tuple[Completion, ...]) -> None:
        """Take what one prompt gave."""
        self.done += 1
        self.tokens += sum(len(completion.tokens) for completion in completions)
        self._waiting[index] = completions
        while self._printed in self._waiting:
            self._print(self._printed)
            self._printed += 1
        now = time.perf_counter()
        if now - self.said >= EVERY_S and self.done < len(self.inputs):
            self.said = now
            self.out.talk(self._so_far(now))

    def close(self) -> None:
        """Print what waits for a line that does not come any more, and say what was done."""
        for index in sorted(self._waiting):
            self._print(index)
        self.out.talk(self._so_far(time.perf_counter()))

    def _print(self, index: int) -> None:
        completions = [completion_json(completion) for completion in self._waiting.pop(index)]
        line = {**self.inputs[index], "completions": completions}
        print(json.dumps(line, ensure_ascii=False), flush=True)

    def _so_far(self, now: float) -> str:
        rate = self.tokens / (now - self.started)
        return (
            f"{self.done:,} of {len(self.inputs):,} prompts, {self.tokens:,} tokens in "
            f"{now - self.started:.1f} s, {rate:,.1f} tok/s"
        )
