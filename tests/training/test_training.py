"""Training and resuming: exact, durable, and quiet about itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from smolctl.config import RunConfig, load_run_config
from smolctl.config.load import merge, resolve_run_config
from smolctl.data.batches import StepLoader, validation_batches
from smolctl.errors import ExitCode, InputError, SmolError, UsageError
from smolctl.evaluation import bits_per_byte
from smolctl.runs.events import Checkpoint, End, Event, Note, Prediction, Step, Validation
from smolctl.runs.folder import RunFolder
from smolctl.sources import open_source
from smolctl.training.device import decide
from smolctl.training.guards import NonFiniteError
from smolctl.training.prepare import Prepared, prepare
from smolctl.training.train import train
from tests.support.tiny_runs import (
    SHORT,
    TINY,
    assert_same,
    assert_same_run,
    go_on,
    losses,
    prepare_tiny,
    run,
    state,
    with_steps,
    write_corpus,
)

Make = Callable[..., Prepared]
Finished = Callable[[str], Path]
DROPOUT = merge(SHORT, {"model": {"attention_dropout": 0.3}})


@pytest.fixture
def dropped(make: Make, once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A short run with dropout, without a stop. Only to be read."""
    return once("dropped", lambda folder: run(make(**DROPOUT), f"{folder}/run")) / "run"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus to be changed."""
    return write_corpus(tmp_path / "corpus")


def test_interrupted_run_equals_continuous_run(make: Make, whole: Path) -> None:
    parts = run(make(**with_steps(10)), "parts")
    events = go_on(parts, extra=5)
    assert [event.step for event in events if isinstance(event, Step)] == [11, 12, 13, 14, 15]
    assert_same_run(whole, parts)


def test_resuming_twice_equals_continuous_run(make: Make, whole: Path) -> None:
    parts = run(make(**with_steps(3)), "parts")
    go_on(parts, extra=4)
    go_on(parts, until=15)
    assert_same_run(whole, parts)


def test_interrupted_run_equals_continuous_run_with_dropout(make: Make, dropped: Path, whole: Path) -> None:
    parts = run(make(**merge(DROPOUT, with_steps(3))), "parts")
    go_on(parts, until=6)
    assert_same_run(dropped, parts, 6)
    assert losses(dropped) != losses(whole)[:6]


def test_going_back_to_an_older_step_repeats_the_run(finished: Finished, whole: Path) -> None:
    again = finished("again")
    go_on(again, step=5, force=True)
    assert_same_run(whole, again)


def test_predictions_and_validation_do_not_change_the_training(make: Make, dropped: Path) -> None:
    off = {"predictions": {"every": 0}, "validation": {"every": 0}}
    blind = run(make(**merge(DROPOUT, off)), "off")
    for part in ("state_dict", "optimizer_states"):
        assert_same(state(dropped, 6)[part], state(blind, 6)[part])
    assert losses(dropped) == losses(blind)
    assert not (blind / "predictions.jsonl").exists()


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_change_nothing_but_rounding(size: int, make: Make, whole: Path) -> None:
    folder = run(make(train={"micro_batch_size": size, "steps": 5}), "other")
    for one, two in zip(losses(whole)[:5], losses(folder), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    score, other = (
        next(line["bits_per_byte"] for line in RunFolder(path).metrics() if line["event"] == "validation")
        for path in (whole, folder)
    )
    assert score == pytest.approx(other, abs=1e-4)


def test_the_held_out_score_does_not_depend_on_the_micro_batch(make: Make) -> None:
    prepared = make()
    assert prepared.corpus.validation is not None
    lengths = torch.from_numpy(prepared.tokenizer.token_byte_lengths()).long()
    scores = set()
    for size in (1, 2, 3, 4, 8):
        batches = list(validation_batches(prepared.corpus.validation, 32, size, 7))
        assert sum(len(batch) for batch in batches) == 7
        scores.add(round(bits_per_byte(prepared.network, batches, lengths).bits_per_byte, 5))
    assert len(scores) == 1


def test_a_config_that_counts_held_out_batches_is_still_read() -> None:
    old = merge(TINY, {"validation": {"every": 5, "batches": 3}, "train": {"batch_size": 4}})
    with pytest.raises(InputError, match=r"validation\.batches"):
        resolve_run_config(old, "both")
    del old["validation"]["sequences"]
    assert resolve_run_config(old, "old").validation.sequences == 12


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(make: Make, workers: int) -> None:
    dataset = make().dataset()
    direct = list(StepLoader(dataset, 3, 12))
    with_workers = list(StepLoader(dataset, 3, 12, workers))
    assert all(torch.equal(one, two) for one, two in zip(direct, with_workers, strict=True))


def test_devices_share_the_step_that_one_device_would_do(make: Make) -> None:
    prepared = make()
    whole = prepared.dataset()[7]
    shares = [prepared.dataset(rank, 2)[7] for rank in (0, 1)]
    assert torch.equal(whole, torch.cat(shares))


def test_loss_goes_down_and_events_tell_the_story(make: Make) -> None:
    events: list[Event] = []
    faster = {"optimizer": {"learning_rate": 0.01}, "schedule": {"decay_start": 30}}
    folder = run(make(**with_steps(30), **faster), "story", events)
    steps = [event for event in events if isinstance(event, Step)]
    assert [event.step for event in steps] == list(range(1, 31))
    found = [event.loss for event in steps if event.loss is not None]
    assert len(found) == 30
    assert found[-1] < 0.8 * found[0]
    assert [event.step for event in events if isinstance(event, Checkpoint)] == [0, *range(5, 31, 5)]
    checks = [event for event in events if isinstance(event, Validation)]
    assert checks[-1].bits_per_byte < checks[0].bits_per_byte
    assert all((event.standard_error or 0) > 0 for event in checks)
    predictions = [event for event in events if isinstance(event, Prediction)]
    assert {event.prompt for event in predictions} == {"the cat", "a"}
    assert [event.step for event in predictions][::2] == [0, *range(5, 31, 5)]
    assert all(0 < candidate.probability <= 1 for event in predictions for candidate in event.top)
    assert isinstance(events[-1], End)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in (
        "config.yaml",
        "environment.json",
        "tokenizer/tokenizer.json",
        "predictions.jsonl",
        "report.html",
    ):
        assert (folder / name).stat().st_size > 0
    assert Path("runs/latest").resolve() == folder.resolve()


def test_saved_config_is_resolved_and_loads_again(make: Make) -> None:
    schedule = {"warmup_steps": 0.2, "decay_start": None, "decay_steps": 0.4}
    prepared = make(schedule=schedule, train={"compile": "auto"})
    folder = run(prepared, "resolved")
    saved = RunFolder.open(folder).config()
    assert saved == prepared.config
    assert (saved.schedule.warmup_steps, saved.schedule.decay_start, saved.schedule.decay_steps) == (3, 9, 6)
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["compile"] is False  # 15 steps


def test_checkpoints_load_as_plain_data(whole: Path) -> None:
    content = torch.load(whole / "checkpoints" / "step-000015.ckpt", weights_only=True)
    assert content["global_step"] == 15
    assert RunConfig.model_validate(content["hyper_parameters"]["config"]).train.steps == 15
    assert {"rng", "data", "tokenizer"} <= content["smolctl"].keys()


def test_old_checkpoints_make_room(make: Make) -> None:
    settings = {"every": 2, "keep_last": 2, "keep_every": 6, "keep_best": False}
    folder = run(make(checkpoint=settings), "room")
    assert [file.step for file in RunFolder(folder).checkpoints()] == [6, 12, 14, 15]
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    kept = (*(f"step-{step:06d}.ckpt" for step in (6, 12, 14, 15)), "final.ckpt")
    assert names == {f"{name}{end}" for name in kept for end in ("", ".sha256")}
    assert (folder / "checkpoints" / "final.ckpt").samefile(folder / "checkpoints" / "step-000015.ckpt")


def test_nothing_left_to_do_is_an_error(finished: Finished) -> None:
    folder = finished("done")
    with pytest.raises(UsageError, match="at step 15 already"):
        go_on(folder)
    with pytest.raises(UsageError, match="nothing to do"):
        go_on(folder, until=15)


def test_other_data_is_refused(corpus: Path) -> None:
    folder = run(prepare_tiny(corpus, **with_steps(1)), "data")
    (corpus / "00.txt").write_text("the cat saw other birds " * 40)
    with pytest.raises(InputError, match="the corpus is not the one"):
        go_on(folder, extra=1)


def test_other_tokenizer_is_refused(make: Make, finished: Finished) -> None:
    folder = finished("tokens")
    other = make(tokenizer="train:280").tokenizer
    other.save(folder / "tokenizer")
    with pytest.raises(InputError, match="another tokenizer"):
        go_on(folder, extra=1)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_checkpoint_is_named_and_the_newest_good_one_offered(finished: Finished, damage: str) -> None:
    folder = finished("damaged")
    path = folder / "checkpoints" / "step-000015.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-1000]), "empty": b""}[damage])
    with pytest.raises(InputError) as error:
        go_on(folder, extra=1)
    assert str(path) in error.value.message
    assert f"{folder}@10" in error.value.hint
    assert [event.step for event in go_on(folder, step=10, until=12) if isinstance(event, Step)] == [11, 12]


def test_non_finite_loss_stops_before_the_weights_are_touched(make: Make) -> None:
    prepared = make(checkpoint={"every": 1})
    module = prepared.network.get_submodule("model.layers.0.mlp")

    def poison(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if module.training and poison_now() else output

    calls = iter(range(10**6))

    def poison_now() -> bool:
        return next(calls) >= 2 * 2 + 6  # a few steps in: the plan and two micro-batches a step come before

    module.register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match="the step was not taken") as error:
        train(prepared, "tiny", Path("nan"), force=False, emit=lambda _event: None)
    newest = RunFolder(Path("nan")).checkpoints()[-1]
    assert f"step {newest.step + 1}:" in error.value.message
    assert all(
        torch.isfinite(tensor).all() for tensor in state(Path("nan"), newest.step)["state_dict"].values()
    )
    for name, parameter in prepared.network.named_parameters():
        assert torch.equal(parameter, state(Path("nan"), newest.step)["state_dict"][f"network.{name}"])


def test_non_finite_loss_names_the_windows_of_the_bad_micro_batch(make: Make) -> None:
    prepared = make()
    bad_step, size = 6, 2
    bad = prepared.dataset()[bad_step][size:, :-1]  # the second micro-batch of step 7
    windows = prepared.dataset().windows(bad_step)

    def poison(_module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if torch.equal(inputs[0], bad) else output

    prepared.network.model.register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match="step 7: loss nan") as error:
        run(prepared, "bad")
    named = error.value.message.split("that begin at tokens ")[1]
    assert named.startswith(
        ", ".join(prepared.dataset().tokens.describe(window) for window in windows[size:])
    )
    assert len(windows) == 2 * size


def test_a_run_is_not_overwritten_without_force(make: Make, finished: Finished) -> None:
    folder = finished("mine")
    with pytest.raises(UsageError, match="not empty"):
        run(make(), "mine")
    train(make(**with_steps(5)), "tiny", folder, force=True, emit=lambda _event: None)
    assert [file.step for file in RunFolder(folder).checkpoints()] == [0, 5]
    other = Path("other")
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not replaced"):
        train(make(), "tiny", other, force=True, emit=lambda _event: None)
    assert (other / "thesis.txt").read_text() == "precious"


def test_a_failing_listener_costs_nothing_that_was_saved(make: Make, whole: Path) -> None:
    def fail_at_ten(event: Event) -> None:
        if isinstance(event, Validation) and event.step == 10:
            raise RuntimeError("the display broke")

    with pytest.raises(RuntimeError, match="the display broke"):
        train(make(), "tiny", Path("listener"), force=False, emit=fail_at_ten)
    assert RunFolder(Path("listener")).checkpoints()[-1].step == 10
    go_on(Path("listener"))
    assert_same_run(whole, Path("listener"))


def test_fine_tuning_starts_from_the_weights_of_a_run(make: Make, workshop: Path, whole: Path) -> None:
    values = merge(
        TINY, {"data": {"source": str(workshop / "corpus")}, "train": {"steps": 2}, "tokenizer": None}
    )
    values = {key: value for key, value in values.items() if key != "model"}
    values["data"]["sequence_length"] = 16
    prepared = prepare(resolve_run_config(values, "test"), open_source(str(whole)), lambda _event: None)
    trained = state(whole, 15)["state_dict"]
    assert all(torch.equal(trained[f"network.{n}"], p) for n, p in prepared.network.named_parameters())
    assert prepared.tokenizer.sha256 == make().tokenizer.sha256
    second = run(prepared, "second")
    assert losses(second)[0][1] == pytest.approx(losses(whole)[-1][1], rel=0.2)


def test_a_corpus_shorter_than_a_window_is_refused(corpus: Path) -> None:
    for path in corpus.iterdir():
        path.unlink()
    (corpus / "short.txt").write_text("the cat")
    with pytest.raises(SmolError) as error:
        run(prepare_tiny(corpus), "short")
    assert error.value.exit_code == ExitCode.BAD_INPUT
    assert "33" in error.value.message


def test_out_of_memory_names_the_setting_to_change(make: Make) -> None:
    prepared = make()

    def exhaust(*_: Any) -> None:
        torch.empty(1 << 50)  # a petabyte: the allocator itself refuses

    prepared.network.model.layers[1].register_forward_pre_hook(exhaust)
    with pytest.raises(SmolError, match="out of memory with 2 sequences") as error:
        run(prepared, "oom")
    assert "--micro-batch-size 1" in error.value.hint


def test_resuming_says_what_the_learning_rate_does(make: Make) -> None:
    folder = run(make(schedule={"decay_start": 10, "decay_steps": 5}), "rates")
    notes = [event.text for event in go_on(folder, step=10, force=True) if isinstance(event, Note)]
    assert any("0.003 at step 10, 0.0024 at step 11, 0 at step 15" in note for note in notes)
    notes = [event.text for event in go_on(folder, extra=2) if isinstance(event, Note)]
    assert any("nothing would be learned" in note for note in notes)


def test_activations_computed_again_change_no_bit(make: Make, dropped: Path) -> None:
    again = run(make(**merge(DROPOUT, {"train": {"checkpoint_activations": True}})), "computed-again")
    assert losses(dropped) == losses(again)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_train_alike_and_leave_the_same_names(make: Make, whole: Path) -> None:
    compiled = run(make(train={"compile": True}), "compiled")
    assert [row[1] for row in losses(compiled)] == pytest.approx([row[1] for row in losses(whole)], rel=1e-4)
    one, other = (state(folder, 15)["state_dict"] for folder in (whole, compiled))
    assert one.keys() == other.keys()


def test_long_runs_on_a_gpu_are_compiled_and_short_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    long, short = (load_run_config("nano", [f"train.steps={steps}"]) for steps in (5_000, 50))
    asked = load_run_config("nano", ["train.compile=false", "train.steps=5000"])
    compiles = [decide(config, lambda _: None)[0].train.compile for config in (long, short, asked)]
    assert compiles == [True, False, False]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decide(long, lambda _: None)[0].train.compile is False


def test_training_imports_neither_torchmetrics_nor_transformers() -> None:
    code = (
        "import sys, smolctl.training.train; "
        "print([name for name in ('torchmetrics', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
