"""`--minutes`: a run ends in time, whatever its steps take, and what the clock decided is recorded."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from smolctl.config import RunConfig, load_run_config
from smolctl.errors import UsageError
from smolctl.runs.folder import RunFolder
from smolctl.training.clock import Clock, Task
from smolctl.training.optim.schedule import learning_rate
from smolctl.training.plan import measure_training_speed
from smolctl.training.prepare import Prepared
from smolctl.training.resume import ResumeOptions
from smolctl.training.verify import verify
from tests.support.tiny_models import tiny_network
from tests.support.tiny_runs import assert_same_run, go_on, run, state

TASK_SECONDS = {"save": 1.5, "validate": 12.0}  # the second comes at the end for the first time
# Seconds of a step, by the share of the time that is over.
SPEEDS: dict[str, Callable[[float, int], float]] = {
    "steady": lambda share, step: 0.1,
    "after a slow start": lambda share, step: 30.0 if step == 1 else 0.1,
    "slower in the second half": lambda share, step: 0.1 if share < 0.5 else 0.2,
    "faster at the end": lambda share, step: 0.1 if share < 0.7 else 0.05,
    "in fits and starts": lambda share, step: 0.05 + 0.3 * (step * 7919 % 10 == 0),
    "of large batches": lambda share, step: 4.0,
}


def played(
    config: RunConfig, seconds: float, step_seconds: Callable[[float, int], float]
) -> tuple[RunConfig, float]:
    """The config of a run of a given time at its end, and how long it took, without a single real step."""
    time = 0.0
    guess = 10.0 / step_seconds(0.0, 2)
    tasks = {"save": Task(200), "validate": Task(50_000, guess), "predict": Task(0, 1_000)}
    clock = Clock(seconds, tasks, lambda: time)
    for step in range(1, 1 << 20):
        time += step_seconds(time / seconds, step)
        until = clock.steps(step, config.train.steps)
        if until != config.train.steps:
            config = config.with_end(step, until)
        last = step >= config.train.steps
        for task, cost in TASK_SECONDS.items():
            if last or step % tasks[task].every == 0:
                with clock.timed(task):
                    time += cost
        if last:
            return config, time
    raise AssertionError("it does not end")


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("planned", [100, 3_000, 50_000])
@pytest.mark.parametrize("name", ["wsd", "cosine", "linear"])
def test_a_run_ends_in_time_with_its_whole_schedule(speed: str, planned: int, name: str) -> None:
    schedule = {"name": name, "decay_steps": 0.3 if name == "wsd" else 0}  # 0: they fall to the last step
    values = {"train": {"steps": planned, "minutes": 5}, "schedule": schedule}
    begun = RunConfig.model_validate(values).with_whole_steps()
    config, seconds = played(begun, 300.0, SPEEDS[speed])
    assert seconds == pytest.approx(300, rel=0.05)

    rates = [learning_rate(step, 1.0, config.schedule) for step in range(1, config.train.steps + 1)]
    assert max(rates) > 0.9
    assert rates[-1] < 0.05
    top = rates.index(max(rates))
    assert all(a <= b for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in pairwise(rates[top:]))
    again = RunConfig.model_validate(config.model_dump(mode="json"))
    assert again == config


def test_a_correction_changes_no_rate_of_the_steps_before_it() -> None:
    config = RunConfig.model_validate({"train": {"steps": 90}, "schedule": {"decay_steps": 0.3}})
    config = config.with_whole_steps()
    seen: dict[int, float] = {}
    for step, until in ((20, 70), (40, 75), (60, 66)):
        seen |= {done: learning_rate(done, 1e-3, config.schedule) for done in range(1, step + 1)}
        config = config.with_end(step, until)
        assert {done: learning_rate(done, 1e-3, config.schedule) for done in seen} == seen


def test_one_of_steps_epochs_and_minutes_counts() -> None:
    own = load_run_config("chat", flags={"train": {"minutes": 3.0}}).train
    assert (own.minutes, own.epochs) == (3.0, None)
    with pytest.raises(UsageError, match=r"train.steps and train.minutes cannot be combined"):
        load_run_config("nano", flags={"train": {"minutes": 3.0, "steps": 5}})
    with pytest.raises(ValidationError, match="both say how long"):
        RunConfig.model_validate({"train": {"minutes": 3.0, "epochs": 5}})


def test_numbers_of_steps_in_a_preset_become_shares_of_its_own() -> None:
    schedule = load_run_config("smollm2-135m", flags={"train": {"minutes": 3.0}}).schedule
    assert (schedule.warmup_steps, schedule.decay_start, schedule.decay_steps) == (0.4, None, 0)


def test_what_the_clock_decided_is_recorded_and_a_resumed_run_is_a_function_of_it(
    make: Callable[..., Prepared],
) -> None:
    changes = {
        "train": {"minutes": 0.005},
        "schedule": {"warmup_steps": 0.1, "decay_start": None, "decay_steps": 0.4},
        "checkpoint": {"every": 10, "keep_best": False},
        **{name: {"every": 0} for name in ("validation", "predictions")},
    }
    folder = run(make(**changes), "run")
    steps = [file.step for file in RunFolder(folder).checkpoints()]
    config = RunFolder(folder).config()
    assert config.train.steps == steps[-1]
    assert state(folder, steps[-1])["hyper_parameters"]["config"] == config.model_dump(mode="json")
    assert verify(folder, ResumeOptions(step=0), lambda _event: None).exact

    until = RunConfig.model_validate(state(folder, 0)["hyper_parameters"]["config"]).train.steps
    one, two = Path("one"), Path("two")
    for part in (one, two):
        go_on(folder, step=0, out=part)
        assert RunFolder(part).checkpoints()[-1].step == until
    assert_same_run(one, two, until)


def test_the_first_step_waits_for_one_micro_batch_and_one_sequence_to_be_timed() -> None:
    network, sequences = tiny_network(), list[int]()
    network.model.register_forward_pre_hook(lambda _, inputs: sequences.append(len(inputs[0])))
    assert (
        measure_training_speed(network, torch.zeros(4, 9, dtype=torch.long), load_run_config("nano", [])) > 0
    )
    assert sequences == [1, 4]
