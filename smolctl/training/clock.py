"""`train.minutes`: how many steps fit into the time that is left, as the run itself measures it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from smolctl.config import RunConfig
from smolctl.model.network import Transformer
from smolctl.training.device import decide, process_count
from smolctl.training.guards import naming_the_memory_knob
from smolctl.training.plan import measure_speed

# The time that is left is measured anew after so large a share of the whole, or of the steps that are left.
TIME_SHARE, STEPS_SHARE = 1 / 20, 1 / 8
LEAST_CHANGE = 0.01  # of the steps in all: smaller ones are not worth a correction


def steps_in(minutes: float, network: Transformer, config: RunConfig, document_end: int | None) -> int:
    """The steps that a run of so many minutes may have, as one micro-batch of random tokens says.

    Args:
        minutes: of the run.
        network: of the run.
        config: of the run; its number of steps does not count.
        document_end: token that ends a document, where attention stays within documents.
    """
    config, _ = decide(config, lambda _event: None)
    device, processes = config.trainer.accelerator, process_count(config)
    shape = max(1, config.micro_batch_size // processes), config.data.sequence_length + 1
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with naming_the_memory_knob(config.micro_batch_size):
        speed = measure_speed(network.to(device), tokens.to(device), config, document_end)
    speed *= processes if device == "cuda" else 1
    return max(1, round(minutes * 60 * speed / config.tokens_per_step))


class Clock:
    """Measures a run that has `seconds` from now on.

    Args:
        seconds: for all of the run: its steps, and what it does beside them.
        now: the time in seconds.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.perf_counter) -> None:
        self._seconds, self._now = seconds, now
        self._started = now()
        self._beside = 0.0  # seconds so far that were no part of a step
        self._marks: list[tuple[int, float]] = []  # steps, and the seconds that they had taken
        self._costs: dict[str, float] = {}  # seconds that saving, validating and the like took last time

    @contextmanager
    def beside(self, task: str) -> Iterator[None]:
        """What runs inside is no part of a step."""
        started = self._now()
        yield
        self._costs[task] = self._now() - started
        self._beside += self._costs[task]

    def steps(self, step: int, until: int, every: Mapping[str, int]) -> int:
        """At which step the run shall end: `until`, unless the time says otherwise by more than a little.

        Args:
            step: that is just done.
            until: the last step, as planned so far.
            every: steps from one to the next of each task beside the steps; 0: there is none. Each comes once
                more at the end.
        """
        elapsed = self._now() - self._started
        taken = elapsed - self._beside
        if not self._marks:  # the first step also compiles, allocates and reads for the first time
            self._marks.append((step, taken))
        last_step, last_taken = self._marks[-1]
        is_enough = step - last_step >= STEPS_SHARE * (until - step)
        if step == last_step or not (is_enough or taken - last_taken >= TIME_SHARE * self._seconds):
            return until
        # The newer half of the steps: calm, and still of what the machine does now.
        half, before = next((mark for mark in reversed(self._marks) if 2 * mark[0] <= step), self._marks[0])
        self._marks.append((step, taken))
        costs = {task: cost for task, cost in self._costs.items() if every.get(task)}
        seconds = (taken - before) / (step - half) + sum(cost / every[task] for task, cost in costs.items())
        found = step + max(0, round((self._seconds - elapsed - sum(costs.values())) / seconds))
        return found if abs(found - until) > LEAST_CHANGE * until else until
