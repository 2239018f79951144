"""The display of a run: whole lines at every width, calm without a terminal, JSON for machines."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from smolctl.arithmetic import TrainingMemory
from smolctl.runs.events import (
    Candidate,
    Checkpoint,
    End,
    Event,
    Note,
    Prediction,
    RunPlan,
    Start,
    Step,
    Validation,
)
from smolctl.runs.folder import RunFolder
from smolctl.views.output import Output
from smolctl.views.training import TrainingView

PLAN = RunPlan(
    parameters=135_104_832,
    steps=5_000,
    batch_size=8,
    sequence_length=1_024,
    tokens_per_step=8_192,
    tokens=40_960_000,
    corpus_tokens=12_000_000,
    held_out_tokens=120_000,
    documents=34_567,
    duplicates=1_234,
    epochs=3.41,
    tokens_per_parameter=0.303,
    memory=TrainingMemory(1, 2, 3, 4, 5, {}),
    memory_bytes=500_000_000,
    framework_bytes=400_000_000,
    gap_bytes=10_000_000,
    checkpoint_bytes=1_620_000_000,
    checkpoints_kept=3,
    disk_bytes=4_860_000_000,
    disk_free_bytes=90_000_000_000,
    device="cuda",
    tokens_per_second=98_765.4,
    eta_s=415.0,
)
STEP = Step(1_240, 4.1234, 3e-3, 0.52, 10_158_080, 0.083, 98_765.4, 312.0, 41_620_000_000, 0.3821)
LONG = "a prompt that is much longer than any line of a terminal has room for, and then some more of it"
PROMPTS = (
    "The capital of France is",
    "def f(n):\n\treturn ",
    LONG,
    "鳥が木の上を飛んで、猫が座っている。" * 3,
)
STORY: tuple[Event, ...] = (
    Start("runs/smollm2-135m-001", 0, 5_000, PLAN),
    Checkpoint(1_000, "runs/x/checkpoints/step-001000.ckpt", 1_620_000_000, 2.5),
    *(replace(STEP, step=step, loss=10 / step**0.2) for step in range(1, 1_240)),
    STEP,
    Validation(1_000, 1.2345, 0.0123, 4.2),
    *(Prediction(1_000, prompt, "\x1b[31m says\n" + "so " * 60, 1.0, ()) for prompt in PROMPTS),
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def consoles(out: Output, width: int, terminal: bool) -> tuple[io.StringIO, io.StringIO]:
    """Put consoles of a width in place of the process's own."""
    files = io.StringIO(), io.StringIO()
    for name, file in zip(("stdout", "stderr"), files, strict=True):
        out.__dict__[name] = Console(file=file, width=width, height=40, force_terminal=terminal)
    return files


def panel(events: tuple[Event, ...], width: int) -> list[str]:
    """The lines of the live display after some events."""
    out = Output()
    consoles(out, width, terminal=True)
    with TrainingView(out) as view:
        for event in events:
            view(event)
        lines = out.stdout.render_lines(view._panel(), pad=False)
        return ["".join(segment.text for segment in line) for line in lines]


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_the_display_has_the_same_whole_lines_at_every_width(width: int) -> None:
    lines = panel(STORY, width)
    assert len(lines) == len(panel(STORY, 80))
    assert all(cell_len(line) == width for line in lines)
    assert not any(character in line for line in lines for character in "\x1b\n\t")


def test_the_display_shows_all_that_is_known_at_80_columns() -> None:
    text = "\n".join(panel(STORY, 80))
    for fact in (
        "runs/smollm2-135m-001",
        "step 1,240 of 5,000",
        "24.8%",
        "4.1234",
        "1.2345 ± 0.0123 bits/byte at step 1,000",
        "lr 0.003",
        "gradient norm 0.52",
        "98,765 tok/s",
        "MFU 38.2%",
        "memory 41.6 GB",
        "10.2 M tokens",
        "5 min 12 s",
        "step 1,000, 0 s ago",
        "predictions at step 1,000",
        "The capital of France is",
        "def f(n):⏎⇥return",
        "␛[31m says⏎so so",
    ):
        assert fact in text
    assert "█" in text
    assert "a prompt that is much longer" in text
    assert "…" in text
    assert LONG not in text


def test_what_is_not_known_takes_no_room() -> None:
    text = "\n".join(panel((STORY[0], replace(STEP, mfu=None, memory_bytes=None)), 80))
    assert "98,765 tok/s" in text
    for absent in ("MFU", "memory", "None", "held out", "predictions"):
        assert absent not in text
    assert "waiting for the first step" in "\n".join(panel(STORY[:1], 80))


def test_a_note_stands_above_the_live_display() -> None:
    out = Output()
    stdout, stderr = consoles(out, 80, terminal=True)
    with TrainingView(out) as view:
        for event in (*STORY, Note("step 7: the prediction failed [so]; training goes on")):
            view(event)
    assert "step 7: the prediction failed [so]; training goes on" in stdout.getvalue()
    assert not stderr.getvalue()


def rounds(*steps: int) -> Iterator[Prediction]:
    return (Prediction(step, "the cat", f" at {step}", 1.0, (Candidate("x", 0.5),)) for step in steps)


@pytest.mark.parametrize("width", [80, 140])
def test_the_end_tells_how_the_answers_changed_over_all_sessions(width: int) -> None:
    recorder = RunFolder(Path("x"))
    recorder.path.mkdir()
    for prediction in rounds(0, 500, 1_000, 1_500, 2_000, 2_500):  # by the sessions before this one
        recorder.record(prediction)
    out = Output()
    stdout, _ = consoles(out, width, terminal=False)
    with TrainingView(out) as view:
        view(Start("x", 2_500, 4_000, PLAN))
        for prediction in rounds(3_000, 3_500, 4_000):
            view(prediction)
        view(End(4_000, "x", "done", 60.0))
    table = stdout.getvalue().split("Predictions")[1]
    assert [line.split()[-1] for line in table.splitlines() if " at " in line and "step" not in line] == [
        "0",
        "1000",
        "2000",
        "3000",
        "4000",
    ]
    assert all(cell_len(line) <= width for line in table.splitlines())
    assert "predictions.md" in table


def test_without_a_terminal_lines_are_few_and_plain() -> None:
    out = Output()
    stdout, stderr = consoles(out, 120, terminal=False)
    with TrainingView(out) as view:
        for event in (*STORY, Note("something")):
            view(event)
    lines = [line for line in stdout.getvalue().splitlines() if line.startswith("step ")]
    assert len([line for line in lines if "tok/s" in line]) < 5
    assert lines[1].startswith("step 1/5,000  loss 10.0000  lr 0.003  gradient 0.52  98,765 tok/s  MFU 38.2%")
    assert "\x1b" not in stdout.getvalue()
    assert stderr.getvalue() == "something\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_says_nothing(terminal: bool) -> None:
    out = Output(quiet=True)
    stdout, stderr = consoles(out, 80, terminal)
    with TrainingView(out) as view:
        for event in (*STORY, Note("something"), End(5_000, "x", "done", 1.0)):
            view(event)
    assert not stdout.getvalue()
    assert not stderr.getvalue()


def test_json_is_one_object_a_line_whatever_the_model_says(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["a\u2028b\x85c\u2029d", '"\\\n\r\t\x00', "\U0001f600"]
    with TrainingView(Output(json=True)) as view:
        for text in texts:
            view(Prediction(1, "p", text, None, ()))
    seen = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["text"] for event in seen] == texts


def test_a_display_that_fails_ends_the_run() -> None:
    out = Output()
    consoles(out, 80, terminal=False)
    view: Callable[[Event], None] = TrainingView(out)
    with pytest.raises(AttributeError):
        view(Start("x", 0, 1, None))  # type: ignore[arg-type]
