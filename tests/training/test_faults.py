"""Faults made for real: a full disk, a folder that cannot be written, kills, two runs in one folder."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smolctl.errors import ExitCode, InputError
from smolctl.runs.checkpoint_file import find_damage
from smolctl.runs.events import Event, Note, Step
from smolctl.runs.folder import RunFolder
from smolctl.runs.layout import is_run
from smolctl.training.checkpoint import DurableCheckpointIO, SaveError
from smolctl.training.prepare import Prepared
from smolctl.training.train import train
from tests.support.disks import small_disk
from tests.support.processes import call, start
from tests.support.tiny_runs import assert_same_run, go_on, prepare_tiny, run, with_steps, write_project


@pytest.fixture(autouse=True)
def _project(tmp_path: Path) -> None:
    write_project(tmp_path)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Prepared]:
    return functools.partial(prepare_tiny, Path("corpus"))


def good_steps(folder: Path) -> list[int]:
    files = RunFolder(folder).checkpoints()
    assert not [file for file in files if find_damage(file.path)]
    return [file.step for file in files]


# --- the disk -------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Room for three of the tiny checkpoints."""
    with small_disk(tmp_path / "small", "2m") as folder:
        yield folder


def test_full_disk_is_seen_before_the_checkpoint_is_written(
    make: Callable[..., Prepared], small: Path, whole: Path
) -> None:
    with pytest.raises(SaveError, match=r"step-000015\.ckpt: the checkpoint needs") as error:
        run(make(), str(small / "run"))
    assert "earlier checkpoints are untouched" in error.value.hint
    assert good_steps(small / "run") == [0, 5, 10]
    go_on(small / "run", out=Path("elsewhere"), until=15)
    assert_same_run(whole, Path("elsewhere"))


def test_disk_that_is_full_to_the_last_byte_stops_the_run_with_its_reason(
    make: Callable[..., Prepared], small: Path
) -> None:
    folder = run(make(**with_steps(5)), str(small / "run"))
    with pytest.raises(OSError, match="No space left"):
        (small / "ballast").write_bytes(bytes(4 << 20))
    done = call("resume", folder, "--extra", "5")
    assert done.code == 1
    assert "No space left on device" in done.err or "disk has" in done.err
    assert "unexpected" not in done.err
    (small / "ballast").unlink()
    assert good_steps(folder) == [0, 5]
    go_on(folder, until=7)
    assert good_steps(folder) == [0, 5, 7]


def test_write_that_fails_half_way_leaves_the_older_checkpoint(whole: Path) -> None:
    done = call(300_000, "train", "tiny.yaml", "--out", "run", module="tests.support.small_files")
    assert done.code == 1
    assert "step-000005.ckpt: the checkpoint cannot be written (File too large)" in done.err
    assert "unexpected" not in done.err
    assert good_steps(Path("run")) == [0]
    assert not list(Path("run/checkpoints").glob(".*"))
    go_on(Path("run"))
    assert_same_run(whole, Path("run"))


def test_folder_that_cannot_be_written_is_refused_with_the_reason(
    make: Callable[..., Prepared], small: Path
) -> None:
    folder = run(make(**with_steps(5)), str(small / "run"))
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    for arguments in (
        ("resume", str(folder), "--extra", "1"),
        ("train", "tiny.yaml", "--out", f"{folder}-2"),
    ):
        done = call(*arguments)
        assert done.code == 1
        assert "Read-only file system" in done.err
        assert "unexpected" not in done.err
        assert "hint:" in done.err
    go_on(folder, out=Path("branch"), extra=1)
    assert good_steps(Path("branch")) == [5, 6]


def test_emptied_checkpoint_folder_is_said(make: Callable[..., Prepared]) -> None:
    folder = run(make(**with_steps(2)), "run")
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="no checkpoint yet") as caught:
        go_on(folder, extra=1)
    assert caught.value.hint.startswith(f"Start the run again: smolctl train {folder}/config.yaml")


# --- kills and signals ----------------------------------------------------------------------------


EVERY_STEP = ("--steps", "12", *("--set", "checkpoint.every=1"), *("--set", "validation.every=0"), "-q")


def saved_steps(folder: Path) -> list[int]:
    return [file.step for file in RunFolder(folder).checkpoints()] if is_run(folder) else []


def kill_at_random(out: Path, chance: random.Random) -> tuple[int, int]:
    """Train to the end, killed without warning up to four times on the way.

    Returns:
        how often it was killed, and how often of these while a checkpoint was being written.
    """
    kills = writes = 0
    train = ("train", "tiny.yaml", "--out", out, "--force", *EVERY_STEP)
    while 12 not in saved_steps(out):
        with start(*(("resume", out, "-q") if saved_steps(out) else train)) as process:
            in_a_write, passed = chance.random() < 0.5, chance.randrange(12)
            deadline = time.monotonic() + chance.uniform(0.05, 1.0)
            while process.poll() is None and kills < 4:
                writing = any(out.glob("checkpoints/.*.partial"))
                enough = len(saved_steps(out)) > passed
                if writing and enough if in_a_write else time.monotonic() > deadline:
                    process.kill()
            _, errors = process.communicate()
        killed = process.returncode == -signal.SIGKILL
        assert killed or process.returncode == 0, errors
        kills += killed
        writes += killed and any(out.glob("checkpoints/.*.partial"))
    return kills, writes


@pytest.mark.parametrize(
    "runs", [pytest.param(6, marks=pytest.mark.slow), pytest.param(1_000, marks=pytest.mark.proof)]
)
def test_run_killed_at_random_moments_equals_the_run_that_was_left_alone(runs: int) -> None:
    folders = [Path(f"killed-{number}") for number in range(runs)]
    found = [kill_at_random(out, random.Random(7 + number)) for number, out in enumerate(folders)]
    assert sum(kills for kills, _ in found) >= 2 * runs
    assert sum(writes for _, writes in found) >= runs // 2
    assert call("train", "tiny.yaml", "--out", "whole", *EVERY_STEP).code == 0
    for out in folders:
        assert_same_run(Path("whole"), out, 12)
        assert good_steps(out)[-1] == 12


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_second_signal_stops_at_once_and_the_checkpoints_stay(number: signal.Signals, code: int) -> None:
    # A step of many micro-batches takes long: the second signal arrives within it.
    long_steps = ("--batch-size", "20000", "--micro-batch-size", "20", "--set", "validation.every=0")
    process = start("train", "tiny.yaml", *long_steps, "--json", "--out", "run")
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "checkpoint":  # of step 0: training begins
            break
    time.sleep(0.6)
    process.send_signal(number)
    time.sleep(1)
    process.send_signal(number)
    rest = [json.loads(line) for line in process.stdout.read().splitlines()]
    assert process.wait() == code
    assert not [event for event in rest if event["event"] in ("step", "end")]
    assert good_steps(Path("run")) == [0]


SHORT: dict[str, Any] = {
    "train": {"steps": 4},
    "checkpoint": {"every": 2},
    "validation": {"every": 0},
    "predictions": {"every": 0},
}


def test_a_signal_at_the_last_step_leaves_a_finished_run(make: Callable[..., Prepared]) -> None:
    def emit(event: Event) -> None:
        if isinstance(event, Step) and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(make(**SHORT), "tiny", Path("run"), force=False, emit=emit).exit_code == ExitCode.TERMINATED
    final = Path("run/checkpoints/final.ckpt")
    assert final.samefile(RunFolder(Path("run")).checkpoint_path(4))


def test_a_run_whose_folder_is_moved_continues_in_a_new_one(make: Callable[..., Prepared]) -> None:
    said = []

    def emit(event: Event) -> None:
        said.append(event)
        if isinstance(event, Step) and event.step == 3:
            Path("run").rename("moved")

    train(make(**SHORT), "tiny", Path("run"), force=False, emit=emit)
    assert good_steps(Path("run")) == [4]
    assert any(isinstance(event, Note) and "run was moved or deleted" in event.text for event in said)
    go_on(Path("run"), extra=1)


# --- two at once ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_two_runs_started_into_one_folder_one_is_refused() -> None:
    both = [start("train", "tiny.yaml", "--steps", "150", "--out", "same") for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes)[0] == 0
    loser = codes.index(max(codes))
    assert codes[loser] in (2, 3)
    assert "same" in said[loser]
    assert "hint:" in said[loser]
    assert good_steps(Path("same"))[-1] == 150
    lines = Path("same/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"step"' in line and '"loss"' in line][-1] == 150


def test_runs_started_at_once_without_a_folder_get_folders_of_their_own() -> None:
    both = [start("train", "tiny.yaml", "--steps", "3") for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert good_steps(Path("runs/tiny-001")) == good_steps(Path("runs/tiny-002")) == [0, 3]


def test_resuming_a_run_that_is_training_is_refused() -> None:
    process = start("train", "tiny.yaml", "--steps", "100000", "--json", "--out", "busy")
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "step":
            break
    done = call("resume", "busy", "--extra", "1")
    process.kill()
    process.communicate()
    assert done.code == 3
    assert "another process is training this run" in done.err


# --- the cost of a save ---------------------------------------------------------------------------

SAVE = """
import re, sys, torch
from pathlib import Path
from typing import Any
from smolctl.training.checkpoint import DurableCheckpointIO

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

state = {str(number): torch.ones(25_000_000 // 4) for number in range(12)}  # 300 MB
writer = DurableCheckpointIO()
writer.save_checkpoint({"state_dict": {"warm": torch.ones(9)}}, "warm.ckpt")
before = peak()
writer.save_checkpoint({"state_dict": state}, "big.ckpt")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.slow
def test_save_needs_no_second_copy_in_memory() -> None:
    done = subprocess.run([sys.executable, "-c", SAVE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("big.ckpt").stat().st_size > 300_000_000
    assert int(done.stdout) < 60_000_000


def test_a_folder_that_is_removed_during_a_save_is_named(tmp_path: Path) -> None:
    target = tmp_path / "checkpoints" / "step-000001.ckpt"

    class Remover:
        """Removes the folder while it is pickled."""

        def __reduce__(self) -> tuple[type, tuple[str]]:
            shutil.rmtree(target.parent)
            return str, ("",)

    with pytest.raises(SaveError, match="its folder was removed while it was being saved"):
        DurableCheckpointIO().save_checkpoint({"state_dict": {}, "other": Remover()}, target)
