"""What a run shows and records, and that nothing of it can harm the run."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from smolctl.arithmetic import training_flops_per_token
from smolctl.config import load_run_config
from smolctl.config.load import merge
from smolctl.errors import ExitCode, InputError, MissingPackageError
from smolctl.escaping import json_text, one_line
from smolctl.extras import install_command
from smolctl.runs.chart import smoothed, thinned
from smolctl.runs.events import Candidate, End, Event, Note, Prediction, Step, Validation
from smolctl.runs.folder import RunFolder
from smolctl.runs.prediction_history import selection, to_markdown
from smolctl.timing import peak_memory
from smolctl.training import loggers as loggers_module
from smolctl.training.device import flops_utilization, peak_flops, run_peak_flops
from smolctl.training.guards import NonFiniteError
from smolctl.training.prepare import Prepared, prepare
from smolctl.training.resume import ResumeOptions, resume
from smolctl.training.tolerance import Tolerance
from smolctl.training.train import train
from tests.support import tiny_runs
from tests.support.processes import Smolctl
from tests.support.tiny_runs import SHORT, assert_same_run, prepare_tiny, tiny_config, write_project

# Dropout draws from the generators that an observer must not touch.
SIX_STEPS = merge(SHORT, {"model": {"attention_dropout": 0.2}, "schedule": {"decay_start": 100}})
CSV: dict[str, Any] = {"trainer": {"loggers": ["csv"]}}


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_corpus(tmp_path: Path) -> None:
    write_project(tmp_path, **SIX_STEPS)


def prepared(**changes: Any) -> Prepared:
    return prepare_tiny(Path("corpus"), **merge(SIX_STEPS, changes))


def run(out: str, **changes: Any) -> list[Event]:
    """Train a tiny run to its end; what happened."""
    events: list[Event] = []
    result = train(prepared(**changes), "tiny", Path(out), force=False, emit=events.append)
    assert result.exit_code == ExitCode.DONE
    assert isinstance(events[-1], End)
    return events


@pytest.fixture
def whole(once: Callable[[str, Callable[[Path], object]], Path]) -> str:
    """The reference run: six steps without a stop, logged to csv. Only to be read."""
    return str(once("six-steps", lambda folder: run(f"{folder}/run", **CSV)) / "run")


@pytest.fixture
def x(whole: str) -> str:
    """The reference run once more, to be changed."""
    return str(shutil.copytree(whole, "x"))


def go_on(out: str, **options: Any) -> list[Event]:
    events: list[Event] = []
    if "loggers" in options:
        options["settings"] = {"trainer": {"loggers": options.pop("loggers")}}
    resume(Path(out), ResumeOptions(force=True, **options), events.append)
    return events


def notes(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note) and " failed (" in event.text]


def losses(out: str) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss, *_ in tiny_runs.losses(Path(out))]


# Memory and MFU


def test_every_step_tells_the_memory_and_no_mfu_on_a_cpu(whole: str) -> None:
    steps = [record for record in RunFolder(Path(whole)).metrics() if record["event"] == "step"]
    assert len(steps) == 6
    held = [record["memory_bytes"] for record in steps]
    assert min(held) > 50e6  # PyTorch alone is larger
    assert all(later > 0.99 * earlier for earlier, later in pairwise(held))  # Linux counts roughly
    assert all(record["mfu"] is None for record in steps)


def test_memory_rises_when_memory_is_taken() -> None:
    before = peak_memory(torch.device("cpu"))
    taken = torch.ones(1 << 26)  # 256 MiB
    after = peak_memory(torch.device("cpu"))
    assert before is not None
    assert after is not None
    assert 0 <= after - before < 4 * taken.nbytes
    assert after >= taken.nbytes


def test_mfu_is_the_share_of_all_devices_peak_and_counts_the_tied_head() -> None:
    config = load_run_config("smollm2-135m-hub")
    flops = training_flops_per_token(config.model, config.data.sequence_length)
    head = 6 * config.model.vocab_size * config.model.hidden_size
    assert config.model.tie_word_embeddings
    assert flops > 6 * 106_000_000 + head
    assert flops_utilization(config, 1e6, 2 * 989.5e12) == pytest.approx(1e6 * flops / (2 * 989.5e12))
    assert flops_utilization(config, 1e6, None) is None
    assert run_peak_flops(torch.device("cpu"), "32-true", 8) is None


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12, 494.7e12),
        ("NVIDIA H200", 989.5e12, 494.7e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA RTX A4000", None, None),
        ("Some other chip", None, None),
    ],
)
def test_peaks_are_of_the_chip_that_is_named(
    name: str, bfloat16: float | None, float32: float | None
) -> None:
    assert peak_flops(name, "bf16-mixed") == bfloat16
    assert peak_flops(name, "32-true") == float32


# Observers that fail


OBSERVERS = {
    "training.callbacks.bits_per_byte": ["the validation failed"],
    "training.predictions.complete": [
        "the prediction for 'the cat' failed",
        "the prediction for 'a' failed",
    ],
    "runs.folder.to_markdown": ["writing predictions.md failed"],
    "runs.chart.draw_loss": ["drawing loss.png failed"],
    "runs.report.to_html": ["writing report.html failed"],
}


def test_observers_that_fail_are_named_once_and_leave_no_trace(
    whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        random.random(), np.random.rand(), torch.rand(1)
        raise RuntimeError("boom\nand more")

    for target in OBSERVERS:
        monkeypatch.setattr(f"smolctl.{target}", fail)
    events = run("broken")
    assert sorted(note.split(": ", 1)[1] for note in notes(events)) == sorted(
        f"{what} (RuntimeError: boom and more); training continues"
        for told in OBSERVERS.values()
        for what in told
    )
    assert_same_run(Path(whole), Path("broken"), 6, but="progress")  # of the validations


def test_a_prompt_that_does_not_fit_costs_only_itself() -> None:
    events = run("x", predictions={"prompts": ["the cat", "on a mat " * 20]})
    assert [event.step for event in events if isinstance(event, Prediction)] == [0, 2, 4, 6]
    (note,) = notes(events)
    assert "the model's context holds 32" in note


def test_a_logger_that_fails_is_left_out_and_the_others_go_on(
    whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    CSVLogger = vars(loggers_module)["CSVLogger"]
    log = CSVLogger.log_metrics

    def fail_at_three(self: Any, metrics: Any, step: int) -> None:
        if step == 3:
            torch.rand(1)
            raise OSError("no space left")
        log(self, metrics, step)

    monkeypatch.setattr(CSVLogger, "log_metrics", fail_at_three)
    events = run("broken", trainer={"loggers": ["csv", "tensorboard"]})
    expected = "step 3: the csv logger failed (OSError: no space left) and is left out; training continues"
    assert notes(events) == [expected]
    assert losses(whole) == losses("broken")
    assert [step for step, _ in scalars("broken")["loss"]] == [1, 2, 3, 4, 5, 6]


def test_a_logger_that_cannot_be_opened_is_told_before_the_first_step() -> None:
    ready = prepared(trainer={"loggers": ["csv"]})
    events: list[Event] = []

    def emit(event: Event) -> None:
        if event.event == "start":
            Path("x/logs").write_text("in the way")
        events.append(event)

    assert train(ready, "tiny", Path("x"), False, emit).exit_code == ExitCode.DONE
    (note,) = notes(events)
    assert note.startswith("step 0: the csv logger failed (")


@pytest.mark.parametrize("error", [NonFiniteError("nan"), KeyboardInterrupt(), SystemExit(143)])
def test_what_must_end_a_run_is_not_swallowed(error: BaseException) -> None:
    told: list[Event] = []
    with pytest.raises(type(error)), Tolerance(told.append)("looking", 1):
        raise error
    assert not told


# Loggers


def rows(out: str) -> list[dict[str, str]]:
    with Path(out, "logs/csv/metrics.csv").open(newline="") as file:
        timed = ("tokens_per_second", "memory_bytes")
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def tensorboard_events(out: str) -> Iterator[Any]:
    """Every event in the order of files and lines, as TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event as TensorBoardEvent

    for path in sorted(Path(out, "logs/tensorboard").glob("events.*"), key=lambda p: p.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            length = struct.unpack("<Q", content[:8])[0]  # then a checksum, the event and a checksum
            yield TensorBoardEvent.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def scalars(out: str) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in tensorboard_events(out):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_loggers_write_into_the_run_folder_and_change_nothing() -> None:
    run("without")
    events = run("with", trainer={"loggers": ["csv", "tensorboard"]})
    assert_same_run(Path("without"), Path("with"), 6)
    told = [event.text for event in events if isinstance(event, Note) and event.text.startswith("Logging")]
    assert told == [
        "Logging to csv: with/logs/csv/metrics.csv",
        "Logging to tensorboard: tensorboard --logdir with/logs/tensorboard",
    ]
    steps = [row for row in rows("with") if row["loss"]]
    assert [(int(row["step"]), float(row["loss"])) for row in steps] == losses("with")
    assert {"learning_rate", "gradient_norm"} <= steps[0].keys()
    checks = {int(row["step"]): row for row in rows("with") if row["validation_bits_per_byte"]}
    assert list(checks) == [2, 4, 6]
    logged = scalars("with")
    assert logged["loss"] == [(step, float(np.float32(loss))) for step, loss in losses("with")]
    assert [step for step, _ in logged["validation_bits_per_byte"]] == [2, 4, 6]
    assert "mfu" not in logged


def test_csv_is_continued_on_resume_and_repeated_steps_stand_there_once(whole: str) -> None:
    run("parts", **CSV, train={"steps": 4})
    go_on("parts", until=6)
    assert rows("parts") == rows(whole)
    go_on("parts", step=2, until=6)
    assert rows("parts") == rows(whole)


def test_a_logger_named_on_resume_begins_with_what_lies_behind_the_run(whole: str) -> None:
    run("later", train={"steps": 4})
    go_on("later", until=6, loggers=["csv"])
    assert rows("later") == rows(whole)
    go_on("later", step=4, until=6)
    assert rows("later") == rows(whole)  # the run remembers its loggers
    go_on("later", step=4, until=5, loggers=[])
    assert rows("later") == rows(whole)  # and forgets them


def test_tensorboard_is_told_where_a_resumed_run_goes_on() -> None:
    run("x", trainer={"loggers": ["tensorboard"]})
    go_on("x", step=4, until=6)
    events = list(tensorboard_events("x"))
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [5]
    assert [step for step, _ in scalars("x")["loss"]] == [1, 2, 3, 4, 5, 6, 5, 6]


@pytest.mark.parametrize("command", ["train", "resume"])
def test_a_missing_package_is_named_before_anything_is_done(
    command: str, x: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_run_config(f"{x}/config.yaml")
    monkeypatch.setattr(loggers_module, "find_spec", lambda _name: None)
    heard: list[Event] = []
    config = tiny_config(Path("none"), trainer={"loggers": ["wandb"]})
    begin: dict[str, Callable[[], object]] = {
        "train": lambda: prepare(config, None, heard.append),
        "resume": lambda: go_on(x, extra=1, loggers=["csv", "wandb"]),
    }
    with pytest.raises(MissingPackageError, match="wandb is not installed") as error:
        begin[command]()
    assert install_command("wandb") in error.value.hint
    assert not heard
    assert load_run_config(f"{x}/config.yaml") == before


def test_an_unknown_logger_is_an_error_that_names_the_known_ones(x: str) -> None:
    with pytest.raises(InputError, match="tensorboard"):
        go_on(x, extra=1, loggers=["tensorbord"])


def test_command_line_names_loggers_and_remembers_them(smolctl: Smolctl) -> None:
    done = smolctl("train", "tiny.yaml", "--logger", "csv", "--logger", "tensorboard", "--out", "x", "--json")
    assert done.code == 0
    assert all(isinstance(json.loads(line), dict) for line in done.out.splitlines())
    assert load_run_config("x/config.yaml").trainer.loggers == ("csv", "tensorboard")
    assert smolctl("resume", "x", "--extra", "1", "--logger", "none", "-q").code == 0
    assert load_run_config("x/config.yaml").trainer.loggers == ()
    assert [row["step"] for row in rows("x") if row["loss"]][-1] == "6"


# predictions.md and the other records


def story(out: str) -> str:
    return Path(out, "predictions.md").read_text(encoding="utf-8")


def test_predictions_md_tells_every_round_also_after_going_back(whole: str) -> None:
    assert [line for line in story(whole).splitlines() if line.startswith("## ")] == [
        "## `the cat`",
        "## `a`",
    ]
    assert story(whole).count("**Step 4** · ") == 2
    run("parts", train={"steps": 4})
    go_on("parts", until=6)
    assert story("parts") == story(whole)
    for step in (2, 0):
        go_on("parts", step=step, until=6)
        assert story("parts") == story(whole)
        lines = [Path(out, "predictions.jsonl").read_text() for out in ("parts", whole)]
        assert lines[0] == lines[1]


def test_predictions_of_steps_to_come_are_gone_as_soon_as_a_run_goes_back(x: str) -> None:
    RunFolder(Path(x)).keep_records(2)
    assert "**Step 2**" in story(x)
    assert "**Step 4**" not in story(x)


TEXT = st.one_of(st.text(), st.text(alphabet="`~|\\\n\r\t *_#<>[]()&;x\x00\x1b\x85\u2028"))


@given(prompt=TEXT, text=TEXT, token=TEXT)
def test_no_text_breaks_out_of_its_place_in_predictions_md(prompt: str, text: str, token: str) -> None:
    prediction = Prediction(5, prompt, text, 1.25, (Candidate(token, 0.5), Candidate("after", 0.25)))
    parsed = MarkdownIt("commonmark").parse(to_markdown({prompt: (prediction,)}))
    kinds = [part.type for part in parsed if part.nesting != -1 and part.type != "inline"]
    last = "fence" if text else "paragraph_open"
    assert kinds == ["heading_open", "paragraph_open", "heading_open", "paragraph_open", last]
    inline = [part for part in parsed if part.type == "inline"]
    codes = [child.content for part in inline for child in part.children or [] if child.type == "code_inline"]
    assert codes[-1] == "after"
    assert len(codes) == 1 + bool(prompt) + bool(token)
    if prompt:
        assert codes[0].replace("␣", " ") == one_line(prompt).replace("␣", " ")
    if text:
        (fence,) = (part for part in parsed if part.type == "fence")
        assert one_line(fence.content.removesuffix("\n")) == one_line(text)


@given(text=st.text())
def test_a_record_is_one_line_for_every_reader_of_lines(text: str) -> None:
    line = json_text({"text": text})
    assert line.splitlines() == [line]
    assert json.loads(line) == {"text": text}


NUMBERS = st.floats() | st.integers() | st.none() | st.booleans() | st.text() | st.just("half \ud800 a pair")


@given(value=st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_all_json_is_strict_and_has_null_for_what_is_no_number(value: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    for indent in (None, 2):
        text = json_text(value, indent)
        text.encode()
        assert json.loads(text, parse_constant=refuse) == finite(value)


def test_records_with_any_text_and_a_line_that_was_cut_off_survive_a_resume(tmp_path: Path) -> None:
    recorder = RunFolder(tmp_path)
    texts = ["a\u2028b", "c\x85d", "\ud7ff\U0001f600", '"\\\n']
    for step, text in enumerate(texts, start=1):
        recorder.record(Prediction(step, "p", text, None, ()))
    with (tmp_path / "predictions.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "prediction", "step": 1, "pro')
    recorder.keep_records(3)
    assert [prediction.text for prediction in recorder.predictions()["p"]] == texts[:3]


def test_a_selection_keeps_the_first_the_last_and_some_between() -> None:
    history = tuple(Prediction(step, "p", "", None, ()) for step in range(0, 5_001, 500))
    assert [prediction.step for prediction in selection(history, 5)] == [0, 1000, 2500, 4000, 5000]
    assert selection(history[:3], 5) == history[:3]


# The loss curve


def test_the_smooth_line_does_not_lag_behind_a_falling_loss() -> None:
    falling = np.linspace(10, 0, 1001)
    assert np.abs(smoothed(falling)[:-50] - falling[:-50]).max() < 1e-9
    noisy = falling + np.random.default_rng(0).normal(size=1001)
    assert np.abs(smoothed(noisy) - falling)[200:].max() < 1


def test_a_long_run_is_drawn_with_few_points_of_the_same_mean() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    few = thinned(values, 4_000)
    assert len(few) == 4_000
    assert few.mean() == pytest.approx(values.mean())
    assert thinned(values[:100], 4_000) is not None
    assert np.array_equal(thinned(values[:100], 4_000), values[:100])


@pytest.mark.parametrize("z_loss", [None, 0.01])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_a_loss_curve_can_be_drawn_of_any_run(tmp_path: Path, count: int, z_loss: float | None) -> None:
    recorder = RunFolder(tmp_path)
    for step in range(1, count + 1):
        recorder.record(Step(step, 3.0, 1e-3, 1.0, step * 10, 0.1, 100.0, 1.0, None, None, z_loss=z_loss))
    if count:
        recorder.record(Validation(count, 1.0, 0.1, 3.0))
    recorder.draw_loss()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} <= {"loss.png", "metrics.jsonl", "corpus", "tiny.yaml"}


@pytest.mark.slow
def test_a_record_that_cannot_be_written_is_told_once_and_ends_no_run(
    finished: Callable[[str], Path],
) -> None:
    folder = finished("run")
    for name in ("metrics.jsonl", "predictions.jsonl", "loss.png"):
        (folder / name).unlink()
        (folder / name).mkdir()
    events: list[Event] = []
    assert resume(folder, ResumeOptions(extra=2), events.append).exit_code == ExitCode.DONE
    failed = [event.text for event in events if isinstance(event, Note) and "failed" in event.text]
    for name in ("writing metrics.jsonl", "writing predictions.jsonl", "drawing loss.png"):
        assert sum(name in text for text in failed) == 1
