"""Two processes on one CPU (gloo), started as a user would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from smolctl.config.load import merge
from tests.support.tiny_runs import TINY, assert_same_run, losses, state, write_corpus

pytestmark = pytest.mark.slow

TWO = ("--devices", "2", "--strategy", "ddp", "--set", "trainer.accelerator=cpu")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "smolctl")


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    changes: dict[str, Any] = {"data": {"source": "corpus"}, "model": {"attention_dropout": 0.2}}
    Path("tiny.yaml").write_text(yaml.safe_dump(merge(TINY, changes)))


def call(*arguments: str, launcher: tuple[str, ...] = ("-m", "smolctl")) -> str:
    """Run smolctl, with one thread in every process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_interrupted_equal_two_processes_continuous() -> None:
    told = call("train", "tiny.yaml", *TWO, "--out", "whole")
    assert told.count("Ended at step 15") == 1  # one process speaks for both
    call("train", "tiny.yaml", *TWO, "--steps", "6", "--out", "parts")
    call("resume", "parts", "--until", "15")
    assert_same_run(Path("whole"), Path("parts"))
    rng = state(Path("whole"), 15)["smolctl"]["rng"]
    assert len(rng) == 2
    assert (rng[0]["torch"] != rng[1]["torch"]).any()  # each process drops out other weights
    assert call("resume", "parts", "--verify").count("repeat bit for bit") == 1


def test_two_processes_see_what_one_with_accumulation_sees() -> None:
    still = ("--set", "model.attention_dropout=0")
    call("train", "tiny.yaml", *TWO, *still, "--micro-batch-size", "4", "--out", "two")
    call("train", "tiny.yaml", *still, "--micro-batch-size", "2", "--out", "one")
    for two, one in zip(losses(Path("two")), losses(Path("one")), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert state(Path("two"), 15)["smolctl"]["samples"] == state(Path("one"), 15)["smolctl"]["samples"]


def test_torchrun_starts_the_same_run() -> None:
    call("train", "tiny.yaml", *TWO, "--out", "lightning")
    call("train", "tiny.yaml", *TWO, "--out", "torchrun", launcher=TORCHRUN)
    assert_same_run(Path("lightning"), Path("torchrun"))


def test_a_run_of_two_processes_goes_on_in_one() -> None:
    call("train", "tiny.yaml", *TWO, "--steps", "6", "--out", "run")
    told = call("resume", "run", "--extra", "2", "--devices", "1", "--set", "trainer.strategy=auto")
    assert "step 8/8" in told
    assert [loss[0] for loss in losses(Path("run"))] == list(range(1, 9))
