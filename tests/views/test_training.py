"""The display of a run: whole lines at every width, calm without a terminal, JSON for machines."""

from __future__ import annotations

import errno
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from smolctl.arithmetic import TrainingMemory
from smolctl.errors import InputError
from smolctl.escaping import one_line
from smolctl.runs.events import (
    Candidate,
    Checkpoint,
    End,
    Event,
    Note,
    Prediction,
    RunPlan,
    ScheduleOutline,
    Start,
    Step,
    Validation,
)
from smolctl.runs.folder import RunFolder
from smolctl.views.console import PlainConsole
from smolctl.views.output import Output
from smolctl.views.training import TrainingView, plan_table
from smolctl.views.training_display import RunState, TrainingDisplay
from tests.support.terminal import Terminal

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
    schedule=ScheduleOutline("wsd", 3e-3, 3e-4, 100, 1_000, 1, (1e-3, 3e-3, 3e-4)),
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
STEP = Step(
    1_240, 4.1234, 3e-3, 0.52, 10_158_080, 0.083, 98_765.4, 312.0, 41_620_000_000, 0.3821, phase="stable"
)
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
SHORT_PREDICTIONS = (
    Prediction(
        1_000, "The capital of France is", " Paris, a city of the north of the country by the river", 1.0, ()
    ),
    Prediction(1_000, "Once upon a time", ", there was a girl who lived in a house with her mother", 1.0, ()),
    Prediction(
        1_000, "def f(n):", "\n    if n < 2:\n        return n\n    return f(n - 1) + f(n - 2)", 1.0, ()
    ),
)
SHORT_STORY = (*STORY[: -len(PROMPTS)], *SHORT_PREDICTIONS)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def consoles(out: Output, width: int, terminal: bool) -> tuple[io.StringIO, io.StringIO]:
    """Put consoles of a width in place of the process's own."""
    files = io.StringIO(), io.StringIO()
    for name, file in zip(("stdout", "stderr"), files, strict=True):
        out.__dict__[name] = PlainConsole(file=file, width=width, height=40, force_terminal=terminal)
    return files


def state_after(events: Iterable[Event]) -> RunState:
    state = RunState()
    for event in events:
        state(event)
    return state


def display(
    events: Iterable[Event], width: int, height: int, encoding: str = "utf-8", **options: Any
) -> list[str]:
    """The lines of the live display after some events."""
    file = io.TextIOWrapper(io.BytesIO(), encoding)
    console = PlainConsole(file=file, width=width, height=height, force_terminal=True, **options)
    lines = console.render_lines(
        TrainingDisplay(state_after(events)), console.options.update(height=height), pad=False
    )
    return ["".join(segment.text for segment in line) for line in lines]


SIZES = [(140, 40), (80, 24), (100, 30), (200, 60), (60, 20), (40, 15), (20, 5)]
FACTS = (
    "runs/smollm2-135m-001",
    "step 1,240 of 5,000",
    "24.8%",
    "4.1234",
    "1.2345 ± 0.0123 bits/byte",
    "stable, lr 0.003",
    "norm 0.52",
    "0.847, 10.2 M tokens",
    "98,765 tok/s, MFU 38.2%",
    "41.6 GB",
    "elapsed   0 s",
    "time left 5 min 12 s",
    "step 1,000, 0 s ago",
    "every step 4.1234",
    "smoothed",
    "held out 4.2000",
    "predictions at step 1,000",
)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_display_fits_into_every_screen(width: int, height: int) -> None:
    for events in (STORY, STORY[:1], STORY[:5], (*STORY, Note("step 9: " + "very " * 99))):
        lines = display(events, width, height)
        assert len(lines) <= height
        assert all(cell_len(line) <= width for line in lines)
        assert not any(character in line for line in lines for character in "\x1b\n\t")


@pytest.mark.parametrize(("width", "height"), SIZES[:4])
def test_the_display_uses_the_whole_screen_and_cuts_nothing(width: int, height: int) -> None:
    lines = display(SHORT_STORY, width, height)
    text = "\n".join(lines)
    assert [fact for fact in FACTS if fact not in text] == []
    for prediction in SHORT_PREDICTIONS:
        assert squeezed(one_line(prediction.prompt + prediction.text)) in squeezed(text)
    assert "…" not in text
    assert len(lines) >= height - 2
    chart = lines[next(row for row, line in enumerate(lines) if "every step" in line) :]
    axis = next(line for line in chart if "└" in line)
    assert cell_len(axis) == width
    assert chart.index(axis) >= (4 if height < 30 else height // 3)
    assert [label in chart[chart.index(axis) + 1] for label in ("step", "1,000")] == [True, True]


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize(("width", "height"), [(60, 20), (40, 15)])
def test_a_small_screen_keeps_facts_and_the_beginning_of_every_prediction(width: int, height: int) -> None:
    text = "\n".join(display(SHORT_STORY, width, height))
    for fact in FACTS[1:13]:
        assert fact in text
    for prediction in SHORT_PREDICTIONS:
        assert one_line(prediction.prompt)[:14] in text


def test_more_prompts_than_lines_are_counted() -> None:
    many = [Prediction(1_000, f"prompt {number}", " text " * 50, 1.0, ()) for number in range(40)]
    lines = display((*STORY[: -len(PROMPTS)], *many), 80, 24)
    shown = [line for line in lines if line.startswith("prompt")]
    assert len(lines) == 24
    assert len(shown) >= 3
    assert lines[-1].strip() == f"and {40 - len(shown)} more in predictions.md"
    assert "every step" in "".join(lines)


def plan_text(plan: RunPlan) -> str:
    screen = PlainConsole(file=io.StringIO(), width=200)
    screen.print(plan_table(plan))
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def plan_line(outline: ScheduleOutline) -> str:
    lines = plan_text(replace(PLAN, steps=100, schedule=outline)).splitlines()
    return next(line for line in lines if "schedule" in line)


def test_the_plan_says_where_its_time_was_measured_before_compiling() -> None:
    assert "about 6 min 55 s on cuda at 98,765 tok/s, measured on one micro-batch " in plan_text(PLAN)
    compiled = plan_text(replace(PLAN, compiles=True))
    assert (
        "at most 6 min 55 s on cuda at 98,765 tok/s, measured on one micro-batch before compiling" in compiled
    )


def test_the_plan_warns_of_many_epochs() -> None:
    assert "RUN@best" not in plan_text(PLAN)
    assert "the held-out score can get worse" in plan_text(replace(PLAN, epochs=12.0))


def test_the_plan_tells_what_the_run_sees_of_the_schedule() -> None:
    curve = (1e-4, 1e-3, 1e-3, 1e-3, 5e-4, 1e-4)
    line = plan_line(ScheduleOutline("wsd", 1e-3, 1e-4, 9, 40, 11, curve))
    assert "▂███▅▂ wsd: up to 0.001, 0.0001 at the end" in line
    assert "9 warming up, 40 at the peak, 40 decaying, 11 at the floor" in line
    assert "before the warmup" not in line


def test_the_plan_tells_of_a_run_that_never_leaves_its_warmup() -> None:
    line = plan_line(ScheduleOutline("wsd", 5e-4, 5e-4, 100, 0, 0, (1e-5, 5e-4)))
    assert "100 warming up; the run ends before the warmup does" in line


def test_what_is_not_known_takes_no_room() -> None:
    text = "\n".join(display((STORY[0], replace(STEP, mfu=None, memory_bytes=None)), 80, 24))
    assert "98,765 tok/s" in text
    for absent in ("MFU", "memory", "None", "held out", "predictions", "note"):
        assert absent not in text
    assert "waiting for the first steps" in "\n".join(display(STORY[:1], 80, 24))


def test_the_newest_note_stands_in_the_display() -> None:
    text = "\n".join(display((*STORY, Note("one"), Note("step 7: the prediction [so] failed")), 80, 24))
    assert "note: step 7: the prediction [so] failed" in text
    assert "one" not in text.split("note:")[0][-20:]


def test_the_display_needs_no_more_than_ascii_and_no_colour() -> None:
    ascii_only = display(SHORT_STORY, 80, 24, "ascii", safe_box=True)
    own = "".join(ascii_only[: ascii_only.index("predictions at step 1,000")])
    assert set(filter(lambda character: not character.isascii(), own)) == {"±"}
    assert "o held out" in own
    assert "*" in own
    plain = PlainConsole(file=io.StringIO(), width=80, height=24, force_terminal=True, no_color=True)
    plain.print(TrainingDisplay(state_after(STORY)))
    assert isinstance(plain.file, io.StringIO)
    codes = re.findall(r"\x1b\[([\d;]*)m", plain.file.getvalue())
    assert set(codes) <= {"0", "1", "2", "1;2"}  # plain, bold, dim


def test_a_resumed_run_shows_its_whole_loss() -> None:
    recorder = RunFolder(Path("x"))
    recorder.path.mkdir()
    for step in range(1, 101):
        recorder.record(replace(STEP, step=step, loss=9.0 - step / 50))
    recorder.record(Validation(100, 1.5, 0.01, 7.1))
    state = state_after((Start("x", 100, 200, PLAN), replace(STEP, step=101, loss=6.9)))
    assert (list(state.curve[:2]), list(state.curve[-2:])) == ([1.0, 8.98], [101.0, 6.9])
    assert list(state.held_out) == [100.0, 7.1]


@contextmanager
def terminal(out: Output, width: int, height: int) -> Iterator[Terminal]:
    """A terminal in place of the process's stdout and stderr."""
    file = io.StringIO()
    for name in ("stdout", "stderr"):
        out.__dict__[name] = PlainConsole(
            file=file, width=width, height=height, force_terminal=True, force_interactive=True
        )
    seen = Terminal(width, height)
    yield seen
    seen.feed(file.getvalue())


@pytest.mark.parametrize(("width", "height"), SIZES[:2])
def test_when_the_run_has_ended_its_sum_stays_on_the_screen(width: int, height: int) -> None:
    out = Output()
    with terminal(out, width, height) as seen, TrainingView(out) as view:
        for event in (*STORY, End(1_240, "runs/smollm2-135m-001", "SIGINT", 75.0)):
            view(event)
    screen = "\n".join(seen.text.splitlines()[-height:])
    for told in (
        "by SIGINT at step 1,240 of 5,000 after 1 min 15 s",
        "4.1234",
        "1.2345 ± 0.0123 bits/byte at step 1,000",
        "runs/smollm2-135m-001: checkpoints",
        "smolctl resume runs/smollm2-135m-001",
        "smolctl sample runs/smollm2-135m-001",
    ):
        assert told in screen
    assert "every step 4.1234" in seen.text  # the chart
    assert "Plan" in seen.text
    assert "elapsed" not in seen.text  # of the display


@pytest.mark.parametrize("terminal", [True, False])
def test_the_end_of_a_run_names_a_better_checkpoint_that_it_has_kept(terminal: bool) -> None:
    worse = End(5_000, "runs/x", "done", 75.0, best_step=3_000, best_bits_per_byte=1.1882, best_is_kept=True)
    for event, named in ((worse, True), (replace(worse, best_is_kept=False), False)):
        out = Output()
        stdout, _ = consoles(out, 120, terminal)
        with TrainingView(out) as view:
            view(STORY[0])
            view(event)
        assert "3,000" in stdout.getvalue()
        assert ("(runs/x@best)" in stdout.getvalue()) == named


def test_a_terminal_that_was_closed_does_not_fail_the_run() -> None:
    class Closable(io.StringIO):
        gone = False

        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    out, file = Output(), Closable()
    out.__dict__["stdout"] = PlainConsole(
        file=file, width=80, height=24, force_terminal=True, force_interactive=True
    )
    with TrainingView(out) as view:
        for event in STORY:
            view(event)
        file.gone = True
        view(End(1_240, "x", "SIGHUP", 75.0))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("as_json", [True, False])
def test_a_full_disk_under_stdout_does_not_fail_the_run(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with TrainingView(Output(json=as_json)) as view:
            for event in (*STORY, End(1_240, "x", "done", 75.0)):
                view(event)
    assert capsys.readouterr().err.count("stdout cannot be written") == 1


def test_an_error_leaves_the_display_and_says_how_far_the_run_has_come() -> None:
    out = Output()
    with terminal(out, 80, 24) as seen, suppress(InputError), TrainingView(out) as view:
        for event in STORY:
            view(event)
        raise InputError("the disk is full")
    out.error(InputError("the disk is full"))
    last = seen.text.splitlines()[-3:]
    assert "step 1,240/5,000  loss 4.1234" in last[-2] + last[-1]
    assert "elapsed" not in seen.text


def test_what_is_said_beside_the_display_is_kept_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Output()
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    out.__dict__["stdout"] = PlainConsole(file=io.StringIO(), force_terminal=True, force_interactive=True)
    out.__dict__["stderr"] = PlainConsole(stderr=True, force_terminal=True, no_color=True)
    with TrainingView(out) as view:
        for event in (*STORY, Note("step 7: the prediction failed [so]; training continues")):
            view(event)
        print("a warning of a library", file=sys.stderr)
        assert not said.getvalue()
    assert said.getvalue().splitlines() == [
        "step 7: the prediction failed [so]; training continues",
        "a warning of a library",
    ]


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
