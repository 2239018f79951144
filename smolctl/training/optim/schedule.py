"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

from smolctl.config import RunConfig
from smolctl.config.run import ScheduleConfig
from smolctl.errors import InputError
from smolctl.runs.events import ScheduleOutline

# What the schedule of a resumed run does at steps that were not planned.
LearningRatePolicy = Literal["hold", "extend", "rewarm"]
Phase = Literal["warmup", "stable", "decay", "floor"]
# Maximum share of the next steps for a second warmup and a second decay.
REWARM_SHARE, DECAY_SHARE = 0.1, 0.5
CURVE_POINTS = 40  # of a drawn schedule


def learning_rate(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 1.

    It rises linearly from `begin_learning_rate` to `peak` over `warmup_steps`, stays there until
    `decay_start`, and falls to `min_learning_rate` over `decay_steps` with the shape `name`. After that it is
    constant.

    Args:
        step: counted over the whole run, including the steps before a resume.
        peak: the optimizer's learning_rate.
        schedule: with whole numbers of steps (`RunConfig.with_whole_steps`).
    """
    warmup, start, length = schedule.warmup_steps, schedule.decay_start, schedule.decay_steps
    place = schedule.planned(step)
    risen = place - schedule.begin
    if warmup and risen < warmup:
        return schedule.begin_learning_rate + (peak - schedule.begin_learning_rate) * risen / warmup
    if schedule.name == "constant" or start is None or place <= start or not length:
        return peak
    progress = min(1.0, (place - start) / length)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return schedule.min_learning_rate + (peak - schedule.min_learning_rate) * left


def require_sense(config: RunConfig) -> None:
    """Refuse a schedule that contradicts itself.

    Raises:
        InputError: naming the two settings.
    """
    if found := config.schedule_contradictions():
        raise InputError(found[0], "Change one of the two with --set.")


def outline(config: RunConfig, done: int = 0) -> ScheduleOutline:
    """The shape of a run's schedule over the steps after `done` up to train.steps."""
    config = config.with_whole_steps()
    schedule, first, last = config.schedule, done + 1, config.train.steps
    in_steps = schedule.in_steps()
    top = in_steps.begin + int(in_steps.warmup_steps)  # the first step at the peak
    start, length = in_steps.decay_start or 0, int(in_steps.decay_steps)
    if schedule.name == "constant" or not length:
        start = last
    bottom, start = start + (length or 1), max(top, start)

    def within(low: int, high: int) -> int:
        return max(0, min(last, high) - max(first, low) + 1)

    def rate(step: int) -> float:
        return learning_rate(min(max(step, first), last), config.optimizer.learning_rate, schedule)

    points = min(CURVE_POINTS, last - done)
    return ScheduleOutline(
        name=schedule.name,
        peak=max(map(rate, (first, top, start, last))),
        end=rate(last),
        warmup_steps=within(first, top - 1),
        decay_steps=within(max(top, start + 1), bottom - 1),
        floor_steps=within(max(top, bottom), last),
        curve=tuple(rate(first + (last - first) * i // max(1, points - 1)) for i in range(points)),
    )


def continue_schedule(
    schedule: ScheduleConfig, peak: float, done: int, until: int, policy: LearningRatePolicy
) -> ScheduleConfig:
    """The schedule of a run that continues from step `done` to step `until`.

    Args:
        schedule: so far, with whole numbers of steps.
        peak: the learning rate so far.
        done: number of finished steps.
        until: the new last step.
        policy: `hold` keeps the schedule, with a constant rate after its end; `extend` moves the end of the
            decay to `until`, as if the run had been planned so; `rewarm` adds another warmup from the current
            rate, and another decay that ends at `until`.
    """
    before, schedule = schedule, schedule.in_steps() if policy != "hold" else schedule
    length = int(schedule.decay_steps)
    start = schedule.decay_start or 0
    to_the_end = schedule.name in ("cosine", "linear")  # these decay from the end of the warmup
    if policy == "hold" or (schedule.name == "constant" and policy == "extend"):
        return schedule
    if policy == "extend":
        risen = schedule.begin + int(schedule.warmup_steps)
        moved = {"decay_steps": until - start} if to_the_end else {"decay_start": max(risen, until - length)}
        return schedule.model_copy(update=moved)
    left = until - done
    warmup = min(int(schedule.warmup_steps), max(1, round(REWARM_SHARE * left)))
    decay = left - warmup if to_the_end else min(length, round(DECAY_SHARE * left))
    again = {
        "begin": done,
        "begin_learning_rate": learning_rate(done, peak, before),
        "warmup_steps": warmup,
        "decay_start": until - decay,
        "decay_steps": decay,
    }
    return schedule.model_copy(update=again)


def phase(step: int, schedule: ScheduleConfig) -> Phase:
    """The phase of the schedule at optimizer step `step`, counted from 1.

    Args:
        step: counted over the whole run.
        schedule: with whole numbers of steps (`RunConfig.with_whole_steps`).
    """
    start, length, place = schedule.decay_start, schedule.decay_steps, schedule.planned(step)
    if place - schedule.begin < schedule.warmup_steps:
        return "warmup"
    if schedule.name == "constant" or start is None or place <= start or not length:
        return "stable"
    return "decay" if place - start <= length else "floor"
