"""The learning rate: a pure function of the step."""

from __future__ import annotations

import math

from smolctl.config.run import ScheduleConfig


def learning_rate(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of optimizer step `step`, counted from 1.

    It rises linearly to `peak` over `warmup_steps`, stays there until `decay_start`, and falls to
    `min_learning_rate` over `decay_steps` in the shape that `name` says. Past the end it stays there.

    Args:
        step: of the whole run, whatever the run was resumed from.
        peak: the optimizer's learning_rate.
        schedule: with whole numbers of steps (`RunConfig.with_whole_steps`).
    """
    warmup, start, length = schedule.warmup_steps, schedule.decay_start, schedule.decay_steps
    if step < warmup:
        return peak * step / warmup
    if schedule.name == "constant" or start is None or step <= start or not length:
        return peak
    progress = min(1.0, (step - start) / length)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return schedule.min_learning_rate + (peak - schedule.min_learning_rate) * left
