"""The learning rate as a pure function of the step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from smolctl.config import RunConfig, load_run_config
from smolctl.config.load import resolve_run_config
from smolctl.config.run import ScheduleConfig
from smolctl.errors import InputError
from smolctl.training.optim.schedule import learning_rate, outline, phase, require_sense


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


@given(
    name=st.sampled_from(["wsd", "cosine", "linear", "constant"]),
    steps=st.integers(1, 60),
    done=st.integers(0, 59),
    warmup=st.integers(0, 70),
    start=st.none() | st.integers(0, 80),
    decay=st.integers(0, 70),
    begin=st.integers(0, 5),
)
def test_an_outline_counts_what_the_steps_see(
    name: str, steps: int, done: int, warmup: int, start: int | None, decay: int, begin: int
) -> None:
    done %= steps
    least = 0.25
    run = resolve_run_config(
        {
            "train": {"steps": steps},
            "optimizer": {"learning_rate": 1.0},
            "schedule": {
                "name": name,
                "warmup_steps": warmup,
                "decay_start": start,
                "decay_steps": decay,
                "min_learning_rate": least,
                "begin": begin,
            },
        },
        "test",
    ).with_whole_steps()
    assume(not run.schedule_contradictions())
    found = outline(run, done)
    rates = [learning_rate(step, 1.0, run.schedule) for step in range(done + 1, steps + 1)]
    rising = sum(step - begin < warmup for step in range(done + 1, steps + 1))
    assert found.warmup_steps == rising
    assert found.floor_steps == rates[rising:].count(least)
    assert found.decay_steps == sum(least < rate < 1 for rate in rates[rising:])
    assert (found.peak, found.end) == (max(rates), rates[-1])
    assert set(found.curve) <= set(rates)
    assert (found.curve[0], found.curve[-1]) == (rates[0], rates[-1])


def test_the_outline_of_a_long_run_is_not_computed_step_by_step() -> None:
    found = outline(load_run_config("smollm2-135m-pretrain", ["train.steps=200000000000"]))
    assert (found.warmup_steps, found.decay_steps, found.floor_steps) == (2 * 10**8 - 1, 4 * 10**10 - 1, 1)


@pytest.mark.parametrize(
    ("schedule", "named"),
    [
        ({"warmup_steps": 10, "decay_start": 5, "decay_steps": 20}, "decay_start 5 comes before the end"),
        ({"name": "cosine", "warmup_steps": 10, "decay_start": 9}, "decay_start 9 comes before the end"),
        ({"min_learning_rate": 1.0}, "min_learning_rate 1 is above optimizer.learning_rate"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(schedule: dict[str, Any], named: str) -> None:
    run = resolve_run_config({"train": {"steps": 100}, "schedule": schedule}, "test").with_whole_steps()
    with pytest.raises(InputError, match=named) as raised:
        require_sense(run)
    assert raised.value.hint


def test_the_brief_s_rates_are_those_of_its_lambda_one_step_earlier() -> None:
    run = load_run_config("smollm2-135m")
    for step in (1, 1_000, 2_000, 5_000):
        brief = step / 2_000 if step < 2_000 else 1.0  # its lr_lambda(step), called before step `step + 1`
        assert learning_rate(step, 1.0, run.schedule) == brief


def test_shares_of_the_steps_become_whole_steps_once() -> None:
    run = RunConfig.model_validate(
        {"train": {"steps": 200}, "schedule": {"warmup_steps": 0.1, "decay_steps": 0.25}}
    ).with_whole_steps()
    assert (run.schedule.warmup_steps, run.schedule.decay_start, run.schedule.decay_steps) == (20, 150, 50)
    longer = run.model_copy(update={"train": run.train.model_copy(update={"steps": 400})})
    assert longer.with_whole_steps().schedule == run.schedule  # a resumed run keeps its schedule
