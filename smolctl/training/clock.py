"""`train.minutes`: how many steps fit into the remaining time, as measured during the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from smolctl.config import RunConfig
from smolctl.model.network import Transformer
from smolctl.training.device import decide, process_count
from smolctl.training.guards import explaining_memory_errors
from smolctl.training.plan import measure_training_speed

# The remaining time is measured again after this share of the total time, or of the remaining steps.
TIME_SHARE, STEPS_SHARE = 1 / 20, 1 / 8
LEAST_CHANGE = 0.01  # of all steps: smaller corrections are not made


def steps_in(minutes: float, network: Transformer, config: RunConfig, document_end: int | None) -> int:
    """Estimate the steps of a run of this many minutes from one micro-batch of random tokens.

    Args:
        minutes: length of the run.
        network: of the run.
        config: of the run; its number of steps is ignored.
        document_end: token that ends a document, if attention stays within documents.
    """
    config, _ = decide(config, lambda _event: None)
    device, processes = config.trainer.accelerator, process_count(config)
    shape = max(1, config.micro_batch_size // processes), config.data.sequence_length + 1
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with explaining_memory_errors(config.micro_batch_size):
        speed = measure_training_speed(network.to(device), tokens.to(device), config, document_end)
    speed *= processes if device == "cuda" else 1
    return max(1, round(minutes * 60 * speed / config.tokens_per_step))


@dataclass(frozen=True)
class Task:
    """Work of a run besides its steps, which is also done once at its end."""

    every: int  # steps between two occurrences; 0: never
    steps: float = 0.0  # duration in steps, as estimated before the first occurrence


def tasks_of(config: RunConfig, held_out: int) -> dict[str, Task]:
    """The tasks of a run with this many held-out tokens."""
    scored = min(held_out, config.validation.sequences * config.data.sequence_length)
    forward = scored / config.tokens_per_step / 3  # without the backward pass, which takes twice as long
    return {
        "save": Task(config.checkpoint.every),
        "validate": Task(config.validation.every, forward),
        "predict": Task(config.predictions.every),
    }


class Clock:
    """Measures a run that may take `seconds` from now on.

    Args:
        seconds: for the whole run: its steps and its tasks.
        tasks: by name.
        now: returns the time in seconds.
    """

    def __init__(
        self, seconds: float, tasks: Mapping[str, Task], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._seconds, self._tasks, self._now = seconds, tasks, now
        self._started = now()
        self._outside_steps = 0.0  # seconds so far outside steps
        self._marks: list[tuple[int, float]] = []  # number of steps, and the seconds that they took
        self._costs: dict[str, float] = {}  # seconds that saving, validation and so on took last time

    @contextmanager
    def timed(self, task: str) -> Iterator[None]:
        """Context of a task, whose time does not count as part of a step."""
        started = self._now()
        yield
        self._costs[task] = self._now() - started
        self._outside_steps += self._costs[task]

    def steps(self, step: int, until: int) -> int:
        """The last step of the run: `until`, unless the time requires a noticeably different one.

        Args:
            step: the step just finished.
            until: the last step as planned so far.
        """
        elapsed = self._now() - self._started
        taken = elapsed - self._outside_steps
        if not self._marks:  # the first step also compiles, allocates and reads for the first time
            self._marks.append((step, taken))
        last_step, last_taken = self._marks[-1]
        is_enough = step - last_step >= STEPS_SHARE * (until - step)
        if step == last_step or not (is_enough or taken - last_taken >= TIME_SHARE * self._seconds):
            return until
        # The later half of the steps: averages out noise, but reflects the current speed.
        half, before = next((mark for mark in reversed(self._marks) if 2 * mark[0] <= step), self._marks[0])
        self._marks.append((step, taken))
        seconds = (taken - before) / (step - half)
        tasks = {name: task for name, task in self._tasks.items() if task.every}
        costs = {name: self._costs.get(name, task.steps * seconds) for name, task in tasks.items()}
        seconds += sum(costs[name] / task.every for name, task in tasks.items())
        found = step + max(0, round((self._seconds - elapsed - sum(costs.values())) / seconds))
        return found if abs(found - until) > LEAST_CHANGE * until else until
