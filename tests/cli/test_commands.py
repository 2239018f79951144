"""train, resume and sample as a user calls them: events, exit codes, signals, JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from smolctl.cores import usable_cpus
from smolctl.durable import file_digest
from smolctl.runs.folder import RunFolder
from tests.support.processes import Smolctl, call, start
from tests.support.terminal import run_in_terminal
from tests.support.tiny_models import write_folder
from tests.support.tiny_runs import assert_same_run, write_project

# Six steps, with everything that a run does every third.
SIX_STEPS: dict[str, Any] = {
    "train": {"steps": 6},
    "schedule": {"warmup_steps": 2, "decay_start": 10_000},
    "checkpoint": {"every": 3},
    "predictions": {"every": 3, "prompts": ["the cat"], "max_tokens": 4},
    "validation": {"every": 3},
}
SELDOM = [f"--set={part}.every=10" for part in ("checkpoint", "predictions", "validation")]
EVENT_KEYS = {
    "start": {"run", "step", "until", "plan"},
    "step": {
        *("step", "loss", "learning_rate", "gradient_norm", "tokens", "tokens_per_second", "eta_s"),
        *("memory_bytes", "mfu"),
    },
    "prediction": {"step", "prompt", "text", "loss", "top"},
    "validation": {"step", "bits_per_byte", "standard_error", "loss"},
    "checkpoint": {"step", "path", "bytes", "seconds"},
    "end": {"step", "run", "reason", "seconds"},
}


@pytest.fixture(autouse=True)
def _tiny_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with tiny.yaml and a corpus, as the working directory."""
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, **SIX_STEPS)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_train_streams_one_json_object_a_line(smolctl: Smolctl) -> None:
    done = smolctl("train", "tiny.yaml", "--json")
    assert done.code == 0
    seen = events(done.out)
    assert {event["event"] for event in seen} - {"note"} == EVENT_KEYS.keys()
    for event in seen:
        assert EVENT_KEYS.get(event["event"], set()) <= event.keys()
    assert [event["step"] for event in seen if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert seen[-1]["event"] == "end"
    assert seen[-1]["reason"] == "done"


def test_the_last_line_of_the_stream_is_the_result(smolctl: Smolctl) -> None:
    for command in (("train", "tiny.yaml", "--out", "x"), ("resume", "x", "--extra", "2")):
        seen = events(smolctl(*command, "--json").out)
        result, last = seen[-1], {event["event"]: event for event in seen}
        for key in ("step", "loss", "tokens"):
            assert result[key] == last["step"][key]
        for key in ("bits_per_byte", "standard_error", "margin"):
            assert result[key] == last["validation"][key]
        a_few_pages = 1 << 20  # by which Linux may count less later, see `peak_memory`
        assert result["memory_bytes"] >= last["step"]["memory_bytes"] - a_few_pages
        assert result["config_sha256"] == file_digest(Path("x/config.yaml"))
    scores = {
        record["step"]: record["bits_per_byte"]
        for record in RunFolder(Path("x")).metrics()
        if record["event"] == "validation"
    }
    assert (result["best_step"], result["best_bits_per_byte"]) == min(scores.items(), key=itemgetter(1))


def test_plain_output_is_calm_and_says_where_the_run_is(smolctl: Smolctl) -> None:
    done = smolctl("train", "tiny.yaml", "--steps", "40", *SELDOM)
    assert done.code == 0
    lines = [line for line in done.out.splitlines() if line.startswith("step ") and "loss" in line]
    assert lines[0].startswith("step 1/40")
    assert any(line.startswith("step 40/40") for line in lines)
    assert len([line for line in lines if "lr" in line]) < 10  # not one for every step
    assert "\x1b" not in done.out
    assert "runs/tiny-001" in done.out


def test_a_terminal_shows_the_run_on_a_screen_of_its_own_and_keeps_its_end() -> None:
    code, terminal = run_in_terminal("train", "tiny.yaml", "--steps", 4, width=80, height=24)
    assert code == 0
    kept = terminal.text
    assert len([line for line in kept.splitlines() if line.startswith("Tokenizing")]) == 1
    for told in ("Plan", "every step", "Predictions", "done      step ", "smolctl sample runs/tiny-001"):
        assert told in kept
    frame = terminal.second[-1]
    assert "runs/tiny-001  step " in frame
    assert "time left" not in kept
    assert "Traceback" not in kept + frame


def test_runs_are_numbered_and_the_newest_is_the_default(smolctl: Smolctl) -> None:
    for number in (1, 2):
        assert smolctl("train", "tiny.yaml", "-q").code == 0
        assert Path("runs/latest").resolve().name == f"tiny-00{number}"
    resumed = smolctl("resume", "--extra", "2", "--json")
    assert [event["step"] for event in events(resumed.out) if event["event"] == "step"] == [7, 8]
    assert RunFolder(Path("runs/tiny-002")).checkpoints()[-1].step == 8
    sampled = smolctl("sample", "--prompt", "the", "--max-tokens", "3", "--json")
    assert sampled.json["model"] == "runs/latest"


def test_flags_beat_set_and_set_beats_the_file(smolctl: Smolctl) -> None:
    command = ("train", "tiny.yaml", "--set", "train.steps=2", "--set", "train.batch_size=2", "--steps", "3")
    assert smolctl(*command, "--out", "x", "-q").code == 0
    saved = RunFolder.open(Path("x")).config()
    assert (saved.train.steps, saved.train.batch_size, saved.checkpoint.every) == (3, 2, 3)


def test_dry_run_prints_the_plan_and_writes_nothing(smolctl: Smolctl) -> None:
    done = smolctl("train", "tiny.yaml", "--dry-run", "--json")
    assert done.code == 0
    plan = events(" ".join(done.out.split()))[-1]["plan"]
    assert plan["steps"] == 6
    assert plan["tokens"] == 6 * 4 * 32
    assert plan["parameters"] == 29_216  # 9,600 + 1,024 + 2 × 9,280 + 32, by hand
    assert plan["eta_s"] > 0
    assert not Path("runs").exists()
    assert "tok/s" in smolctl("train", "tiny.yaml", "--dry-run").out


def test_no_step_left_is_a_usage_error(smolctl: Smolctl) -> None:
    smolctl("train", "tiny.yaml", "-q")
    done = smolctl("resume", "--json")
    assert done.code == 2
    assert json.loads(done.err.splitlines()[-1])["error"]["code"] == 2
    assert "--extra" in done.err


def test_resume_without_a_run_says_how_to_make_one(smolctl: Smolctl) -> None:
    done = smolctl("resume")
    assert done.code == 3
    assert "smolctl train nano" in done.err


def test_sample_json_has_its_keys(smolctl: Smolctl) -> None:
    smolctl("train", "tiny.yaml", "-q")
    done = smolctl("sample", "runs/tiny-001", "--prompt", "the cat", "-n", "2", "--max-tokens", "5", "--json")
    document = done.json
    assert len(document["completions"]) == 2
    for completion in document["completions"]:
        assert completion.keys() == {"text", "tokens", "logprobs", "finish_reason"}
        assert len(completion["tokens"]) == len(completion["logprobs"])
        assert all(value <= 0 for value in completion["logprobs"])
    assert {"load_s", "first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s"} <= document[
        "timing"
    ].keys()


def test_models_stand_side_by_side(smolctl: Smolctl) -> None:
    smolctl("train", "tiny.yaml", "-q")
    pair = ("runs/tiny-001@3", "runs/tiny-001")
    done = smolctl("sample", *pair, "--prompt", "the", "--max-tokens", "4", "--json")
    assert [model["model"] for model in done.json["models"]] == list(pair)
    assert all(name in smolctl("sample", *pair, "--prompt", "the", "--max-tokens", "4").out for name in pair)


def test_the_engine_can_be_chosen_and_is_named(smolctl: Smolctl) -> None:
    smolctl("train", "tiny.yaml", "-q")
    plain = ("sample", "--prompt", "the", "--temperature", "0", "--max-tokens", "20", "--json")
    by_default, native, torch = (
        smolctl(*plain, *more).json for more in ((), ("--engine", "native"), ("--engine", "torch"))
    )
    assert by_default["engine"] == native["engine"]
    assert native["engine"].startswith("native ")
    assert native["engine"].endswith(", float32")
    assert torch["engine"] == "torch cpu, float32"
    assert native["completions"][0]["tokens"] == torch["completions"][0]["tokens"]
    assert smolctl(*plain, "--dtype", "bfloat16").json["engine"].endswith(", bfloat16")
    assert smolctl(*plain, "--engine", "mps").code == 2


@pytest.mark.parametrize(
    "command",
    [
        ("sample", "model", "--prompt", "the cat", "--max-tokens", "3"),
        ("bench", "tiny.yaml", "--suite", "decode", "--repeats", "1"),
    ],
    ids=lambda command: command[0],
)
def test_more_threads_than_processors_are_capped_and_that_is_said(
    command: tuple[str, ...], smolctl: Smolctl
) -> None:
    if command[0] == "sample":
        write_folder(Path("model"))
    before = torch.get_num_threads()
    done = smolctl(*command, "--threads", "100000")
    torch.set_num_threads(before)
    assert done.code == 0, done.err
    assert f"so {usable_cpus()} are used" in done.err
    if command[0] == "bench":
        assert f"{usable_cpus()} threads" in done.out
    assert smolctl(*command, "--threads", "0").code == 2


def test_stop_text_ends_the_answer_and_is_not_part_of_it(smolctl: Smolctl) -> None:
    smolctl("train", "tiny.yaml", "--steps", "60", *SELDOM, "-q")
    plain = ("sample", "--prompt", "the", "--temperature", "0", "--max-tokens", "20", "--json")
    whole = smolctl(*plain).json["completions"][0]
    stop = whole["text"][4:7]
    assert len(stop) == 3
    cut = smolctl(*plain, "--stop", stop).json["completions"][0]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"


def test_chat_without_a_template_says_so(smolctl: Smolctl) -> None:
    smolctl("train", "tiny.yaml", "-q")
    done = smolctl("sample", "--chat", "--prompt", "hello")
    assert done.code == 3
    assert "no chat template" in done.err


def test_prompt_comes_from_stdin_too(smolctl: Smolctl) -> None:
    smolctl("train", "tiny.yaml", "-q")
    done = call("sample", "--max-tokens", "3", "--json", input="the cat\n")
    assert done.json["prompt"] == "the cat"
    assert call("sample", "--max-tokens", "3", "--json", input="").code == 2


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_the_step_and_the_run_goes_on(number: signal.Signals, code: int) -> None:
    forever = ("--steps", "100000", "--set", "checkpoint.every=100000", "--set", "validation.every=0")
    process = start("train", "tiny.yaml", *forever, "--set", "predictions.every=0", "--json", "--out", "x")
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(json.loads(line))
        if seen[-1]["event"] == "step" and seen[-1]["step"] == 5:
            process.send_signal(number)
    assert process.wait() == code
    process.communicate()
    assert seen[-1]["event"] == "end"
    assert seen[-1]["reason"] == number.name
    last = [event["step"] for event in seen if event["event"] == "step"][-1]
    assert RunFolder(Path("x")).checkpoints()[-1].step == last

    done = call("resume", "x", "--extra", "2", "--json")
    steps = [event["step"] for event in events(done.out) if event["event"] == "step"]
    assert steps == [last + 1, last + 2]


@pytest.mark.slow
def test_ctrl_c_ends_a_verification_with_its_code(smolctl: Smolctl) -> None:
    many = ("--steps", "3000", "--set", "checkpoint.every=1500", "--set", "validation.every=0")
    smolctl("train", "tiny.yaml", *many, "--set", "predictions.every=0", "--out", "long", "-q")
    process = start("resume", "long", "--verify")
    assert process.stderr is not None
    assert any("Repeating" in line for line in process.stderr)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130


def test_a_killed_run_goes_on_from_its_last_checkpoint_as_if_nothing_had_happened(smolctl: Smolctl) -> None:
    process = start("train", "tiny.yaml", "--steps", "30", *SELDOM, "--json", "--out", "killed")
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "step" and event["step"] == 11:
            process.kill()
            break
    process.communicate()
    assert smolctl("resume", "killed", "-q").code == 0
    assert smolctl("train", "tiny.yaml", "--steps", "30", *SELDOM, "--out", "whole", "-q").code == 0
    assert_same_run(Path("killed"), Path("whole"), 30)


@pytest.mark.slow
def test_nano_ten_steps_and_five_more_equal_fifteen(smolctl: Smolctl) -> None:
    # A preset's own schedule would fit each number of steps.
    schedule = ("schedule.warmup_steps=5", "schedule.decay_start=12", "schedule.decay_steps=10")
    settings = (*schedule, "predictions.every=0", "validation.every=0")
    quiet = ("-q", *(word for setting in settings for word in ("--set", setting)))
    assert smolctl("train", "nano", "--steps", "10", "--out", "parts", *quiet).code == 0
    assert smolctl("resume", "parts", "--extra", "5", "-q").code == 0
    assert smolctl("train", "nano", "--steps", "15", "--out", "whole", *quiet).code == 0
    assert_same_run(Path("parts"), Path("whole"), 15)


def test_on_windows_the_command_names_the_remedy(smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    called = smolctl("count-params", "nano")
    assert called.code == 3
    assert not called.out
    assert "runs on Linux and macOS, not on Windows" in called.err
    assert "WSL 2" in called.err


def test_a_quota_does_not_hide_that_two_processors_are_one_core(
    smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the command gives to OpenMP is the number of threads that the engine would choose."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # put back after the test
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(8)), raising=False)
    monkeypatch.setattr("smolctl.cores.cpu_quota", lambda _root: 6.0)
    monkeypatch.setattr("smolctl.cores.computing_cores", lambda _root: 4)
    smolctl("count-params", "nano")
    assert os.environ["OMP_NUM_THREADS"] == "4"
