"""The learning rate as a pure function of the step."""

from __future__ import annotations

import pytest

from smolctl.config import RunConfig
from smolctl.config.load import resolve_run_config
from smolctl.config.run import ScheduleConfig
from smolctl.training.optim.schedule import learning_rate, phase


def whole(steps: int, **schedule: object) -> ScheduleConfig:
    run = resolve_run_config({"train": {"steps": steps}, "schedule": schedule}, "test")
    return run.with_whole_steps().schedule


def test_wsd_warms_up_stays_and_decays_linearly() -> None:
    schedule = whole(100, name="wsd", warmup_steps=10, decay_start=80, decay_steps=20)
    rates = [learning_rate(step, 1.0, schedule) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([1 - step / 20 for step in range(1, 21)])


def test_smollm2_schedule_is_the_published_one() -> None:
    schedule = whole(2_000_000, name="wsd", warmup_steps=2_000, decay_start=1_600_000, decay_steps=400_000)
    expected = {1_000: 1.5e-3, 2_000: 3e-3, 1_600_000: 3e-3, 1_800_000: 1.5e-3, 2_000_000: 0.0}
    assert {step: learning_rate(step, 3e-3, schedule) for step in expected} == pytest.approx(expected)


def test_every_step_lies_in_one_phase() -> None:
    wsd = whole(100, name="wsd", warmup_steps=10, decay_start=80, decay_steps=20)
    phases = [phase(step, wsd) for step in range(1, 111)]
    assert phases == ["warmup"] * 9 + ["stable"] * 71 + ["decay"] * 20 + ["floor"] * 10
    assert phase(100, whole(100, name="constant", warmup_steps=10)) == "stable"
    assert {phase(step, whole(100, name="cosine", warmup_steps=10)) for step in range(11, 101)} == {"decay"}


@pytest.mark.parametrize(("name", "middle"), [("cosine", 0.55), ("linear", 0.55)])
def test_cosine_and_linear_fall_from_the_warmup_to_the_last_step(name: str, middle: float) -> None:
    schedule = whole(110, name=name, warmup_steps=10, min_learning_rate=0.1)
    assert learning_rate(10, 1.0, schedule) == 1.0
    assert learning_rate(60, 1.0, schedule) == pytest.approx(middle)
    assert learning_rate(110, 1.0, schedule) == pytest.approx(0.1)
    assert learning_rate(500, 1.0, schedule) == pytest.approx(0.1)


def test_constant_stays_after_its_warmup() -> None:
    schedule = whole(100, name="constant", warmup_steps=4)
    assert [learning_rate(step, 2.0, schedule) for step in (1, 4, 1000)] == [0.5, 2.0, 2.0]


def test_shares_of_the_steps_become_whole_steps_once() -> None:
    run = RunConfig.model_validate(
        {"train": {"steps": 200}, "schedule": {"warmup_steps": 0.1, "decay_steps": 0.25}}
    ).with_whole_steps()
    assert (run.schedule.warmup_steps, run.schedule.decay_start, run.schedule.decay_steps) == (20, 150, 50)
    longer = run.model_copy(update={"train": run.train.model_copy(update={"steps": 400})})
    assert longer.with_whole_steps().schedule == run.schedule  # a resumed run keeps its schedule
