"""A start that fails, and what is never saved: neither leaves anything behind that looks like a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from smolctl.config import RunConfig, load_run_config
from smolctl.config.run import CheckpointConfig, ValidationConfig
from smolctl.errors import ExitCode
from smolctl.runs.events import Step
from smolctl.runs.folder import RunFolder
from smolctl.training.checkpoint import DurableCheckpointIO
from smolctl.training.guards import NonFiniteError
from smolctl.training.plan import _most_checkpoints
from tests.support.processes import Smolctl
from tests.support.tiny_runs import losses, prepare_tiny, run, with_steps, write_project


@pytest.fixture(autouse=True)
def _in_a_project(tmp_path: Path) -> None:
    write_project(tmp_path)


def strict(text: str) -> Any:
    """JSON as other languages read it: NaN and infinities are no values."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON: {text}")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--set", "trainer.accelerator=gpu"),
        ("--set", "trainer.accelerator=mps"),
        ("--set", "trainer.accelerator=toaster"),
        ("--strategy", "wobbly"),
        ("--strategy", "ddp_notebook"),
        ("--strategy", "fsdp"),
        ("--strategy", "fsdp", "--devices", "2"),
        ("--devices", "3"),
        ("--set", "trainer.devices=0"),
        ("--set", "trainer.devices=[0, 7]"),
        ("--set", "trainer.num_nodes=0"),
        ("--set", "optimizer.betas=[1, 0.9]"),
        ("--seed", str(2**32)),
        ("--lr", "inf"),
        ("--lr", "nan"),
        ("--lr", "-1"),
        ("--set", "optimizer.eps=.inf"),
        ("--set", "schedule.min_learning_rate=1"),
        ("--set", "schedule.decay_start=1"),
        ("--set", "train.precision=8-bit"),
    ],
    ids=" ".join,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU to train on")
def test_a_start_that_fails_leaves_nothing(smolctl: Smolctl, arguments: tuple[str, ...]) -> None:
    for out in ((), ("--out", "here")):
        called = smolctl("train", "tiny.yaml", *arguments, *out)
        own = arguments[0] in ("--strategy", "--seed", "--lr")  # the value of an option is a matter of usage
        assert called.code == (ExitCode.USAGE if own else ExitCode.BAD_INPUT), called.err
        assert "unexpected" not in called.err
        cause, remedy = called.err.splitlines()[-2:]
        assert cause.startswith("error: ")
        assert remedy.startswith(" hint: ")
        assert {path.name for path in Path().iterdir()} == {"corpus", "tiny.yaml"}


def test_a_batch_below_the_preset_s_micro_batch_trains(smolctl: Smolctl) -> None:
    called = smolctl("train", "tiny.yaml", "--set", "train.batch_size=1", "--steps", "1", "--out", "small")
    assert called.code == 0, called.err
    assert load_run_config("small/config.yaml").train.micro_batch_size == 1


@pytest.mark.parametrize("rate", ["1e39", "1e300"])
def test_weights_that_overflow_are_not_saved_and_json_stays_json(smolctl: Smolctl, rate: str) -> None:
    called = smolctl("train", "tiny.yaml", "--lr", rate, "--steps", "1", "--out", "hot", "--json")
    assert called.code == ExitCode.FAILED
    assert "holds NaN or infinity" in strict(called.err.splitlines()[-1])["error"]["message"]
    for line in called.out.splitlines():
        strict(line)
    assert [file.step for file in RunFolder(Path("hot")).checkpoints()] == [0]
    for name in ("metrics.jsonl", "predictions.jsonl"):
        for line in Path("hot", name).read_text().splitlines():
            strict(line)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["state_dict", "optimizer_states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_checkpoint_with_one_number_that_is_none_is_written(
    tmp_path: Path, number: float, part: str, dtype: torch.dtype
) -> None:
    moments = [{"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(7, 9, dtype=dtype)}}}]
    content: dict[str, Any] = {
        "global_step": 3,
        "state_dict": {"a": torch.zeros(5, 11, dtype=dtype), "b": torch.zeros(0), "c": torch.ones(2).int()},
        "optimizer_states": moments,
    }
    target = tmp_path / "x.ckpt"
    DurableCheckpointIO().save_checkpoint(content, target)
    before = target.read_bytes()
    broken = content["state_dict"]["a"] if part == "state_dict" else moments[0]["state"][0]["exp_avg"]
    assert isinstance(broken, torch.Tensor)
    broken[-1, -2] = number
    with pytest.raises(NonFiniteError, match="step 3: "):
        DurableCheckpointIO().save_checkpoint(content, target)
    assert target.read_bytes() == before


def test_the_recorded_loss_is_cross_entropy_and_z_loss_stands_beside_it() -> None:
    events: list[Any] = []
    with_z = run(prepare_tiny(Path("corpus"), train={"z_loss": 1e-2, "steps": 2}), "with", events)
    without = run(prepare_tiny(Path("corpus"), **with_steps(2)), "without")
    assert losses(with_z)[0][1] == pytest.approx(losses(without)[0][1], rel=1e-5)
    steps = [event for event in events if isinstance(event, Step)]
    for record, step in zip(map(json.loads, (with_z / "metrics.jsonl").open()), steps, strict=False):
        assert record["z_loss"] == step.z_loss
        assert step.z_loss == pytest.approx(1e-2 * math.log(300) ** 2, rel=0.2)  # all logits are near 0
    first = json.loads((without / "metrics.jsonl").open().readline())
    assert first["z_loss"] is None


@pytest.mark.parametrize("steps", [1, 2, 12, 97])
@pytest.mark.parametrize("every", [1, 6, 40])
@pytest.mark.parametrize("scored", [0, 1, 4])
@pytest.mark.parametrize(("keep_last", "keep_every"), [(0, 0), (3, 0), (2, 5)])
def test_the_plan_counts_the_checkpoints_of_a_run_of_any_length(
    steps: int, every: int, scored: int, keep_last: int, keep_every: int
) -> None:
    checkpoint = CheckpointConfig(every=every, keep_last=keep_last, keep_every=keep_every)
    config = RunConfig(checkpoint=checkpoint, validation=ValidationConfig(every=scored))
    written = {0, *range(0, steps, every), steps}
    if scored:
        written |= {*range(scored, steps, scored)}
    last = keep_last + bool(keep_last and scored)
    kept = min(len(written), last or len(written)) + (steps // keep_every if keep_every else 0)
    assert _most_checkpoints(config, steps, validates=True) == kept
    assert _most_checkpoints(config, 10**12, validates=True) > 0  # without counting one by one
