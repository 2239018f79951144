"""Two processes on one CPU (gloo), started as a user would start them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.launching import ends, under_slurm, under_torchrun
from tests.support.processes import Smolctl, call
from tests.support.tiny_runs import SHORT, assert_same_run, losses, state, write_project

TWO = ("--devices", "2", "--strategy", "ddp", "--set", "trainer.accelerator=cpu")
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "-m", "smolctl")


@pytest.fixture(autouse=True)
def _project(tmp_path: Path) -> None:
    write_project(tmp_path, model={"attention_dropout": 0.2}, **SHORT)


def told_by(*arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """What a run that succeeds says."""
    module, *others = launcher or ("smolctl",)
    done = call(*others, *arguments, module=module)
    assert done.code == 0, done.err
    return done.out


def test_two_processes_interrupted_equal_two_processes_continuous() -> None:
    told = told_by("train", "tiny.yaml", *TWO, "--out", "whole")
    assert told.count("Ended at step 6") == 1  # one process speaks for both
    told_by("train", "tiny.yaml", *TWO, "--steps", "3", "--out", "parts")
    told_by("resume", "parts", "--until", "6")
    assert_same_run(Path("whole"), Path("parts"), 6)
    rng = state(Path("whole"), 6)["smolctl"]["rng"]
    assert len(rng) == 2
    assert (rng[0]["torch"] != rng[1]["torch"]).any()  # each process drops out other weights
    assert told_by("resume", "parts", "--verify").count("repeat bit for bit") == 1


@pytest.mark.slow
def test_two_processes_see_what_one_with_accumulation_sees() -> None:
    still = ("--set", "model.attention_dropout=0")
    told_by("train", "tiny.yaml", *TWO, *still, "--micro-batch-size", "4", "--out", "two")
    told_by("train", "tiny.yaml", *still, "--micro-batch-size", "2", "--out", "one")
    for two, one in zip(losses(Path("two")), losses(Path("one")), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert state(Path("two"), 6)["smolctl"]["samples"] == state(Path("one"), 6)["smolctl"]["samples"]


@pytest.mark.slow
def test_torchrun_starts_the_same_run() -> None:
    told_by("train", "tiny.yaml", *TWO, "--out", "lightning")
    told_by("train", "tiny.yaml", *TWO, "--out", "torchrun", launcher=TORCHRUN)
    assert_same_run(Path("lightning"), Path("torchrun"), 6)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one() -> None:
    told_by("train", "tiny.yaml", *TWO, "--steps", "6", "--out", "run")
    told = told_by("resume", "run", "--extra", "2", "--devices", "1", "--set", "trainer.strategy=auto")
    assert "step 8/8" in told
    assert [loss[0] for loss in losses(Path("run"))] == list(range(1, 9))


# --- how many processes there are -----------------------------------------------------------------


def test_processes_that_torchrun_has_started_train_one_run() -> None:
    done = ends(under_torchrun("train", "tiny.yaml", "--json", size=2))
    assert [process.code for process in done] == [0, 0], done
    assert [path.name for path in Path("runs").glob("tiny-*")] == ["tiny-001"]
    assert len(state(Path("runs/tiny-001"), 6)["smolctl"]["rng"]) == 2
    assert done[1].out == ""


def test_counts_that_contradict_torchrun_are_refused_by_every_process() -> None:
    for process in ends(under_torchrun("train", "tiny.yaml", "--devices", "4", size=2)):
        assert process.code == 2
        assert "torchrun started 2 processes on 1 machine, which is not --devices 4" in process.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        ({"NODE_RANK": "1"}, ("--num-nodes", "2"), "only torchrun and SLURM"),
        ({"NODE_RANK": "1"}, (), "NODE_RANK=1"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, (), "WORLD_SIZE=2 and --devices 1"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (), "OMPI_COMM_WORLD_SIZE=2"),
    ],
)
def test_traces_of_other_processes_make_no_run_of_their_own(
    environment: dict[str, str],
    options: tuple[str, ...],
    said: str,
    smolctl: Smolctl,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = smolctl("train", "tiny.yaml", *options)
    assert done.code == 2
    assert said in done.err
    assert not Path("runs").exists()


def test_counts_are_taken_from_slurm_too() -> None:
    done = call("train", "tiny.yaml", "--devices", "2", env=under_slurm())
    assert done.code == 2
    assert "SLURM started 1 process" in done.err


def test_slurm_that_does_not_say_how_many_processes_a_machine_has_is_told_how() -> None:
    unsaid = {name: value for name, value in under_slurm().items() if name != "SLURM_NTASKS_PER_NODE"}
    done = call("train", "tiny.yaml", env={**unsaid, "SLURM_NTASKS": "4"})
    assert done.code == 2
    assert "--ntasks-per-node" in done.err


def test_fsdp_is_refused_with_its_reason(smolctl: Smolctl) -> None:
    done = smolctl("train", "tiny.yaml", "--strategy", "fsdp")
    assert done.code == 2
    assert "fsdp is not supported" in done.err
    assert not Path("runs").exists()


# --- machines without a shared folder -------------------------------------------------------------


@pytest.fixture
def machines(tmp_path: Path) -> tuple[Path, Path]:
    """The folders of two machines with the same config and data."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
        write_project(folder, **SHORT)
    return folders


def test_machines_without_a_shared_folder_train_one_run_in_that_of_the_first(
    machines: tuple[Path, Path],
) -> None:
    done = ends(under_torchrun("train", "tiny.yaml", "--out", "run", size=2, folders=machines))
    assert [process.code for process in done] == [0, 0], done
    assert [loss[0] for loss in losses(machines[0] / "run")] == list(range(1, 7))
    assert not (machines[1] / "run").exists()


def test_resume_where_one_machine_lacks_the_run_ends_on_both_and_says_what_must_be_shared(
    machines: tuple[Path, Path], whole: Path
) -> None:
    shutil.copytree(whole, machines[0] / "run")
    done = ends(under_torchrun("resume", "run", "--extra", "5", size=2, folders=machines))
    assert [process.code for process in done] == [3, 3]
    assert "run: no such run" in done[1].err
    assert "process 1 on" in done[0].err
    assert "run: no such run" in done[0].err
    assert "put them into a folder that all machines share" in done[0].err


def test_machines_with_other_data_do_not_train_together(machines: tuple[Path, Path]) -> None:
    (machines[1] / "corpus" / "07.txt").write_text("other words altogether " * 40)
    done = ends(under_torchrun("train", "tiny.yaml", "--out", "run", size=2, folders=machines))
    assert [process.code for process in done] == [3, 3]
    for process in done:
        assert "another data and tokenizer than the first process" in process.err


def test_first_process_that_fails_alone_ends_the_others(machines: tuple[Path, Path]) -> None:
    (machines[0] / "run").mkdir()
    (machines[0] / "run" / "notes.txt").write_text("mine")
    done = ends(under_torchrun("train", "tiny.yaml", "--out", "run", size=2, folders=machines))
    assert [process.code for process in done] == [2, 3]
    assert "run is not empty" in done[1].err or "the first process of the run has ended" in done[1].err
