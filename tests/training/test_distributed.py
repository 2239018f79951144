"""Two processes on one CPU (gloo), started as a user would start them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import call
from tests.support.tiny_runs import assert_same_run, losses, state, write_project

pytestmark = pytest.mark.slow

TWO = ("--devices", "2", "--strategy", "ddp", "--set", "trainer.accelerator=cpu")
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "-m", "smolctl")


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, model={"attention_dropout": 0.2})


def told_by(*arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """What a run that succeeds says."""
    module, *others = launcher or ("smolctl",)
    done = call(*others, *arguments, module=module)
    assert done.code == 0, done.err
    return done.out


def test_two_processes_interrupted_equal_two_processes_continuous() -> None:
    told = told_by("train", "tiny.yaml", *TWO, "--out", "whole")
    assert told.count("Ended at step 15") == 1  # one process speaks for both
    told_by("train", "tiny.yaml", *TWO, "--steps", "6", "--out", "parts")
    told_by("resume", "parts", "--until", "15")
    assert_same_run(Path("whole"), Path("parts"))
    rng = state(Path("whole"), 15)["smolctl"]["rng"]
    assert len(rng) == 2
    assert (rng[0]["torch"] != rng[1]["torch"]).any()  # each process drops out other weights
    assert told_by("resume", "parts", "--verify").count("repeat bit for bit") == 1


def test_two_processes_see_what_one_with_accumulation_sees() -> None:
    still = ("--set", "model.attention_dropout=0")
    told_by("train", "tiny.yaml", *TWO, *still, "--micro-batch-size", "4", "--out", "two")
    told_by("train", "tiny.yaml", *still, "--micro-batch-size", "2", "--out", "one")
    for two, one in zip(losses(Path("two")), losses(Path("one")), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert state(Path("two"), 15)["smolctl"]["samples"] == state(Path("one"), 15)["smolctl"]["samples"]


def test_torchrun_starts_the_same_run() -> None:
    told_by("train", "tiny.yaml", *TWO, "--out", "lightning")
    told_by("train", "tiny.yaml", *TWO, "--out", "torchrun", launcher=TORCHRUN)
    assert_same_run(Path("lightning"), Path("torchrun"))


def test_a_run_of_two_processes_goes_on_in_one() -> None:
    told_by("train", "tiny.yaml", *TWO, "--steps", "6", "--out", "run")
    told = told_by("resume", "run", "--extra", "2", "--devices", "1", "--set", "trainer.strategy=auto")
    assert "step 8/8" in told
    assert [loss[0] for loss in losses(Path("run"))] == list(range(1, 9))
