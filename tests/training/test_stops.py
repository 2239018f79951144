"""Signals that stop a run: whichever process gets them, and whenever, no finished step is lost."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from smolctl.runs.folder import RunFolder
from smolctl.training.stopping import EXIT_CODES
from tests.support.launching import ends, under_slurm, under_torchrun
from tests.support.processes import CHECKOUT, Called, call, start
from tests.support.tiny_runs import assert_same_run, write_project

SELDOM = ("validation.every=0", "predictions.every=0", "checkpoint.every=100000", "trainer.accelerator=cpu")
FOREVER = ("--steps", "100000", *(word for setting in SELDOM for word in ("--set", setting)))


@pytest.fixture(autouse=True)
def _project(tmp_path: Path) -> None:
    write_project(tmp_path)


def lost_steps(out: Path) -> int:
    """Finished steps that no checkpoint has."""
    run = RunFolder(out)
    done = [record["step"] for record in run.metrics() if record["event"] == "step"]
    return max(done, default=0) - run.checkpoint().step


@dataclass
class Training:
    """A run of one or several processes that goes on until it is stopped."""

    out: Path
    processes: list[subprocess.Popen[str]]
    ended: list[Called] = field(default_factory=list)

    @classmethod
    def begin(cls, out: Path, size: int, *options: str) -> Training:
        command = ("train", "tiny.yaml", *FOREVER, *options, "--json", "--out", out)
        two = ("--devices", str(size), "--strategy", "ddp")
        return cls(out, [start(*command)] if size == 1 else under_torchrun(*command, *two, size=size))

    def wait_for(self, event: str, step: int = 0) -> None:
        output = self.processes[0].stdout
        assert output is not None
        for line in output:
            said = json.loads(line)
            if said["event"] == event and said.get("step", 0) >= step:
                return
        raise AssertionError(ends(self.processes))

    def require_saved(self, number: signal.Signals) -> None:
        self.ended = ends(self.processes)
        assert lost_steps(self.out) == 0, self.ended
        codes = [process.code for process in self.ended]
        assert codes == [EXIT_CODES[number], *(0 for _ in codes[1:])], self.ended


def stop_at_random(number: signal.Signals, size: int, workers: int, chance: random.Random) -> Training:
    """A run that gets a signal at a random moment: one of its processes, or all and their children."""
    training = Training.begin(Path(f"run-{chance.random()}"), size, "--set", f"data.workers={workers}")
    training.wait_for("step", 1 + chance.randrange(20))
    time.sleep(chance.random() * 0.1)
    if chance.random() < 0.5:
        chance.choice(training.processes).send_signal(number)
    else:
        for process in chance.sample(training.processes, size):
            os.killpg(process.pid, number)
            time.sleep(chance.choice((0, 0, chance.random() * 0.02)))
    return training


@pytest.mark.parametrize("number", EXIT_CODES)
@pytest.mark.parametrize(
    "kills", [pytest.param(4, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.proof)]
)
def test_signal_at_a_random_moment_loses_no_step(number: signal.Signals, kills: int) -> None:
    kinds = [(size, workers) for size in (1, 2) for workers in (0, 2)]
    for kill in range(kills):
        size, workers = kinds[kill % len(kinds)]
        stop_at_random(number, size, workers, random.Random(100 * number + kill)).require_saved(number)


def test_two_signals_that_mean_one_stop_both_processes_with_the_step_saved() -> None:
    training = Training.begin(Path("run"), 2)
    training.wait_for("step", 3)
    for _ in range(2):  # as timeout(1) does: to its child, then to its group
        training.processes[1].send_signal(signal.SIGTERM)
    training.require_saved(signal.SIGTERM)


def test_signal_before_the_first_step_ends_a_resumed_run_at_its_checkpoint(whole: Path) -> None:
    shutil.copytree(whole, "run")
    process = start("resume", "run", "--extra", "100000", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["event"] in ("start", "note")
    process.send_signal(signal.SIGTERM)
    (done,) = ends([process])
    assert done.code in (143, -signal.SIGTERM)  # before training begins there is nothing to save
    assert lost_steps(Path("run")) == 0


@pytest.mark.slow
@pytest.mark.cold
@pytest.mark.parametrize("event", ["start", "checkpoint"])
def test_signal_to_all_while_lightning_starts_its_processes_stops_them_in_order(event: str) -> None:
    two = ("--devices", "2", "--strategy", "ddp", "--json", "--out", "run")
    process = start("train", "tiny.yaml", *FOREVER, *two, start_new_session=True)
    training = Training(Path("run"), [process])
    training.wait_for(event)
    time.sleep(1 if event == "start" else 0)  # its second process is importing
    os.killpg(process.pid, signal.SIGINT)
    training.require_saved(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.cold
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_torchrun_stops_its_processes_with_the_step_saved(number: signal.Signals) -> None:
    command = (
        "--nproc-per-node",
        "2",
        "-m",
        "smolctl",
        "train",
        "tiny.yaml",
        *FOREVER,
        "--json",
        "--out",
        "run",
    )
    training = Training(Path("run"), [start(*command, module="torch.distributed.run")])
    training.wait_for("step", 3)
    training.processes[0].send_signal(number)
    ends(training.processes)
    assert lost_steps(Path("run")) == 0
    assert RunFolder(Path("run")).checkpoint().step >= 3


@pytest.mark.slow
@pytest.mark.cold
def test_lost_terminal_stops_the_run_with_the_step_saved() -> None:
    terminal, inside = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "smolctl", "train", "tiny.yaml", *FOREVER, "--out", "run"]
    process = subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, preexec_fn=take_terminal, close_fds=True
    )
    os.close(inside)
    while b"step" not in os.read(terminal, 1 << 16) or not Path("run/metrics.jsonl").exists():
        pass
    os.close(terminal)
    assert process.wait(60) != 0
    assert RunFolder(Path("run")).checkpoint().step > 0
    assert lost_steps(Path("run")) == 0


def test_run_whose_reader_is_gone_goes_on_to_its_end() -> None:
    process = start("train", "tiny.yaml", "--json", "--out", "run")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    ends([process])
    assert RunFolder(Path("run")).checkpoint().step == 15


@pytest.mark.slow
@pytest.mark.cold
def test_hangup_under_nohup_does_not_stop_the_run() -> None:
    command = ["nohup", sys.executable, "-m", "smolctl", "train", "tiny.yaml", "--out", "run", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["event"] != "step":
        pass
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_slurm_job_saves_before_its_time_is_up_and_the_next_one_goes_on(whole: Path) -> None:
    shutil.copyfile(whole / "checkpoints" / "final.ckpt", "hpc_ckpt_1.ckpt")  # of another run of Lightning's
    before = set(Path.cwd().iterdir())
    process = start("train", "tiny.yaml", "--json", "--out", "run", env=under_slurm())
    training = Training(Path("run"), [process])
    training.wait_for("step", 2)
    process.send_signal(signal.SIGUSR1)
    training.require_saved(signal.SIGUSR1)
    assert call("resume", "run", env=under_slurm()).code == 0
    assert_same_run(whole, Path("run"))
    assert set(Path.cwd().iterdir()) - before == {Path.cwd() / "run", Path.cwd() / "runs"}


@pytest.mark.slow
@pytest.mark.cold
def test_job_script_of_the_documentation_continues_until_the_run_is_done(whole: Path) -> None:
    page = CHECKOUT / "docs" / "devices.md"
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    Path("job.sh").write_text(script.replace("train --out", "train tiny.yaml --out"))
    Path("srun").write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -m smolctl "$@" --json\n')
    Path("scontrol").write_text("#!/bin/sh\necho $@ >>requeued\n")
    for name in ("srun", "scontrol"):
        Path(name).chmod(0o755)
    environment = {**under_slurm(), "PATH": f"{Path.cwd()}:{os.environ['PATH']}"}
    with subprocess.Popen(
        ["bash", "job.sh"], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as job:
        assert job.stdout is not None
        while '"event": "step"' not in job.stdout.readline():
            pass
        (step,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(step), signal.SIGUSR1)
        job.stdout.read()
    assert Path("requeued").read_text() == "requeue 17\n"
    assert 0 < RunFolder(Path("runs/big")).checkpoint().step < 15
    assert subprocess.run(["bash", "job.sh"], env=environment, stdout=subprocess.DEVNULL).returncode == 0
    assert Path("requeued").read_text() == "requeue 17\n"
    assert_same_run(whole, Path("runs/big"))
