"""What `resume` may change, what it refuses, how it branches, and that it can prove itself exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smolctl.config.load import merge
from smolctl.config.run import ScheduleConfig
from smolctl.durable import file_digest
from smolctl.errors import ExitCode, InputError, UsageError
from smolctl.runs.checkpoint_file import find_damage, read_checkpoint, write_checksum
from smolctl.runs.events import Note
from smolctl.runs.folder import RunFolder
from smolctl.training.optim.schedule import continue_schedule, learning_rate
from smolctl.training.prepare import Prepared
from smolctl.training.resume import ResumeOptions, changed_config
from smolctl.training.verify import verify
from tests.support.tiny_runs import (
    SHORT,
    assert_same_run,
    go_on,
    losses,
    prepare_tiny,
    run,
    state,
    tiny_config,
    with_steps,
    write_corpus,
)

MUON = {"optimizer": {"name": "muon", "momentum_warmup": 10, "embedding_lr_multiplier": 2.0}}
Make = Callable[..., Prepared]
Finished = Callable[[str], Path]


def notes(events: list[Any]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


@pytest.mark.parametrize("split", [5, *(pytest.param(split, marks=pytest.mark.slow) for split in (1, 14))])
def test_interrupted_run_with_muon_equals_continuous_run(make: Make, whole: Path, split: int) -> None:
    muon = run(make(**MUON), "muon")
    parts = run(make(**MUON, **with_steps(split)), "parts")
    go_on(parts, until=15)
    assert_same_run(muon, parts)
    assert losses(muon) != losses(whole)
    groups = [state(parts, step)["optimizer_states"][0]["param_groups"][0] for step in (split, 15)]
    assert [group["momentum"] for group in groups] == pytest.approx([0.85 + 0.1 * min(1, split / 10), 0.95])


def test_interrupted_run_with_z_loss_equals_continuous_run(make: Make) -> None:
    short = merge(SHORT, {"train": {"z_loss": 1e-3}})
    whole = run(make(**short), "whole")
    parts = run(make(**merge(short, with_steps(3))), "parts")
    go_on(parts, until=6)
    assert_same_run(whole, parts, 6)


# --- verification ---------------------------------------------------------------------------------


def check(folder: Path, **options: Any) -> Any:
    return verify(folder, ResumeOptions(**options), lambda _event: None)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(MUON, marks=pytest.mark.slow),
        {"model": {"attention_dropout": 0.3}},
        pytest.param({"train": {"precision": "bf16-mixed"}}, marks=pytest.mark.slow),
        pytest.param({"train": {"checkpoint_activations": True}}, marks=pytest.mark.slow),
    ],
)
def test_verification_finds_a_run_exact_and_writes_nothing(make: Make, changes: dict[str, Any]) -> None:
    folder = run(make(**changes), "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = check(folder)
    assert result.exact
    assert (result.first, result.last, result.losses) == (10, 15, 5)
    assert result.tensors > 2 * len(state(folder, 15)["state_dict"])
    assert check(folder, step=0).losses == 15
    assert check(folder, until=10).last == 10
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_verification_sees_one_changed_bit(finished: Finished) -> None:
    folder = finished("run")
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    steps = [number for number, line in enumerate(lines) if json.loads(line)["event"] == "step"]
    record = json.loads(lines[steps[12]])
    record["loss"] *= 1 + 1e-7
    lines[steps[12]] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n")
    result = check(folder)
    assert not result.exact
    assert result.exit_code == ExitCode.GATE_NOT_MET
    assert "step 13" in result.differences[0]


def test_verification_sees_the_sign_of_a_zero(make: Make) -> None:
    folder = run(make(model={"tie_word_embeddings": False}), "run")
    assert check(folder).exact
    path = RunFolder(folder).checkpoint(15).path
    content = read_checkpoint(path, mmap=False)
    moments = [one["exp_avg"] for one in content["optimizer_states"][0]["state"].values()]
    assert sum(int((one == 0).sum()) for one in moments)  # of tokens that never occurred
    for one in moments:
        one[one == 0] = -0.0
    torch.save(content, path)
    write_checksum(path, file_digest(path))
    assert "optimizer" in check(folder).differences[0]


def test_verification_sees_that_a_run_went_another_way(make: Make, finished: Finished) -> None:
    one, two = finished("one"), run(make(optimizer={"learning_rate": 4e-3}), "two")
    foreign = two / "checkpoints" / "step-000010.ckpt"
    for suffix in ("", ".sha256"):
        Path(f"{one}/checkpoints/step-000010.ckpt{suffix}").write_bytes(
            Path(f"{foreign}{suffix}").read_bytes()
        )
    result = check(one)
    assert any("weights" in difference for difference in result.differences)
    assert any("step 11" in difference for difference in result.differences)


def test_verification_needs_two_checkpoints_and_no_changes(make: Make) -> None:
    folder = run(make(checkpoint={"every": 100, "keep_last": 1, "keep_best": False}), "run")
    with pytest.raises(InputError, match="no good checkpoint before"):
        check(folder)
    with pytest.raises(UsageError, match="without changes"):
        check(folder, settings={"optimizer": {"learning_rate": 1.0}})


# --- changes --------------------------------------------------------------------------------------


def test_changed_settings_are_named_and_take_effect(make: Make) -> None:
    folder = run(make(**with_steps(10)), "run")
    settings = {
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.2},
        "checkpoint": {"keep_last": 2},
    }
    said = notes(go_on(folder, extra=2, settings=settings))
    assert any("optimizer.learning_rate 0.003 → 0.001" in note for note in said)
    assert any("checkpoint.keep_last 0 → 2" in note for note in said)
    assert losses(folder)[10][2] == pytest.approx(1e-3)
    assert [file.step for file in RunFolder(folder).checkpoints()] == [10, 12]
    groups = state(folder, 12)["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    assert RunFolder.open(folder).config().optimizer.learning_rate == 1e-3
    assert not any("Changed" in note for note in notes(go_on(folder, extra=1)))  # it stays changed


def test_another_batch_size_goes_on_behind_the_samples_seen(finished: Finished) -> None:
    folder = finished("run")
    go_on(folder, extra=3, settings={"train": {"batch_size": 8}})
    assert state(folder, 18)["smolctl"]["samples"] == 15 * 4 + 3 * 8
    tokens = [
        json.loads(line)["tokens"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["event"] == "step"
    ]
    assert tokens == [*range(128, 1921, 128), 2176, 2432, 2688]
    go_on(folder, extra=1, settings={"train": {"batch_size": 4}})
    assert state(folder, 19)["smolctl"]["samples"] == 88
    assert check(folder).exact


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"model": {"num_hidden_layers": 3}}, "model.num_hidden_layers 2 → 3"),
        ({"data": {"sequence_length": 16}}, "data.sequence_length 32 → 16"),
        ({"data": {"seed": 9}}, "data.seed 8 → 9"),
        ({"tokenizer": "train:290"}, "tokenizer train:300 → train:290"),
        ({"optimizer": {"name": "muon"}}, "optimizer.name adamw → muon"),
        ({"optimizer": {"embedding_lr_multiplier": 2.0}}, "optimizer.embedding_lr_multiplier 1.0 → 2.0"),
    ],
)
def test_what_makes_it_another_run_is_refused(finished: Finished, settings: dict[str, Any], key: str) -> None:
    folder = finished("run")
    before = (folder / "config.yaml").read_text()
    with pytest.raises(InputError) as error:
        go_on(folder, extra=1, settings=settings)
    assert key in error.value.message
    assert "--init-from" in error.value.hint
    assert (folder / "config.yaml").read_text() == before


@pytest.mark.parametrize("length", ["epochs", "minutes"])
def test_what_says_how_long_a_new_run_is_says_nothing_of_a_resumed_one(length: str) -> None:
    asked = {"train": {length: 1.0}}
    for options in (ResumeOptions(settings=asked), ResumeOptions(settings=asked, extra=1)):
        with pytest.raises(InputError, match=rf"train\.{length} None → 1\.0") as error:
            changed_config(tiny_config(Path("corpus")), 15, options)
        assert "--extra" in error.value.hint


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "config.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("learning_rate: 0.003", "learning_rate: 0.001", "optimizer.learning_rate 0.003 → 0.001"),
        pytest.param("keep_last: 0", "keep_last: 2", "checkpoint.keep_last 0 → 2", marks=pytest.mark.slow),
        pytest.param(
            "max_tokens: 5", "max_tokens: 3", "predictions.max_tokens 5 → 3", marks=pytest.mark.slow
        ),
    ],
)
def test_edits_of_the_config_are_taken_and_named(finished: Finished, old: str, new: str, key: str) -> None:
    folder = finished("run")
    edit(folder, old, new)
    said = notes(go_on(folder, extra=1))
    assert any("config.yaml was edited" in note and key.split(" ")[0] in note for note in said)
    assert any(key in note for note in said)
    assert new in (folder / "config.yaml").read_text()
    assert not any("edited" in note for note in notes(go_on(folder, extra=1)))
    edit(folder, "steps: 17 ", "steps: 19 ")
    go_on(folder)
    assert [loss[0] for loss in losses(folder)] == [*range(1, 20)]
    with pytest.raises(UsageError, match=r"--extra and train\.steps cannot"):
        go_on(folder, extra=1, settings={"train": {"steps": 22}})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("num_hidden_layers: 2", "num_hidden_layers: 3", r"model\.num_hidden_layers 2 → 3"),
        ("learning_rate: 0.003", "learning_rate: fast", r"optimizer\.learning_rate"),
        ("model:", "modell:", "unknown key modell"),
        ("model:", "model: {", "config.yaml, line"),
    ],
)
def test_edits_of_the_config_that_cannot_be_taken_are_refused_by_name(
    finished: Finished, old: str, new: str, said: str
) -> None:
    folder = finished("run")
    edit(folder, old, new)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(InputError, match=said):
        go_on(folder, extra=1)
    assert (folder / "config.yaml").read_text() == before


def test_a_comment_in_the_config_is_no_change(finished: Finished, whole: Path) -> None:
    folder = finished("run")
    edit(folder, "model:", "# mine\nmodel:")
    again = go_on(folder, step=10, until=15, force=True)
    assert not any("Changed" in note or "edited" in note for note in notes(again))
    assert_same_run(whole, folder)


# --- the data -------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a corpus, and a cache of its own."""
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path / "corpus")
    return tmp_path


SOURCES: dict[str, dict[str, Any]] = {
    "folder": {"source": "corpus"},
    "file": {"source": "corpus/00.txt", "validation_fraction": 0.0},
    "mixture": {"source": ["corpus", "corpus/00.txt"], "weights": [3, 1], "validation_fraction": 0.0},
    "held-out file": {"source": "corpus", "validation": "corpus/00.txt"},
}

# The kinds of sources; a folder and a mixture in the fast tests.
KINDS = [
    pytest.param(data, id=name, marks=() if name in ("folder", "mixture") else pytest.mark.slow)
    for name, data in SOURCES.items()
]


@pytest.mark.parametrize("data", KINDS)
def test_a_run_goes_on_exactly_without_its_data_and_from_another_working_folder(
    data: dict[str, Any], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = merge(SHORT, {"data": data})
    whole = run(prepare_tiny(Path("corpus"), **short), "whole")
    parts = run(prepare_tiny(Path("corpus"), **merge(short, with_steps(3))), "parts")
    shutil.copytree(parts, "elsewhere/parts")

    Path("corpus").rename("moved")
    said = notes(go_on(parts, until=6))
    assert any("still in the cache" in note for note in said)
    assert_same_run(whole, parts, 6)

    Path("moved").rename("corpus")
    shutil.rmtree("cache")
    monkeypatch.chdir("elsewhere")
    go_on(Path("parts"), until=6)
    assert_same_run(project / whole, Path("parts"), 6)


def test_a_run_whose_data_was_moved_or_is_another_is_told_where_it_is(project: Path) -> None:
    whole = run(prepare_tiny(Path("corpus"), **SHORT), "whole")
    parts = run(prepare_tiny(Path("corpus"), **merge(SHORT, with_steps(3))), "parts")
    shutil.copytree("corpus", "moved")
    (project / "corpus" / "00.txt").write_text("something else " * 50)
    with pytest.raises(InputError, match="not the one that the run was trained on"):
        go_on(parts, until=6)
    shutil.rmtree("corpus")
    shutil.rmtree("cache")
    with pytest.raises(InputError, match="no such file") as error:
        go_on(parts, until=6)
    assert "data.source" in error.value.hint
    said = notes(go_on(parts, until=6, settings={"data": {"source": ["moved"]}}))
    assert any("data.source" in note for note in said)
    assert_same_run(whole, parts, 6)


# --- where to go on -------------------------------------------------------------------------------


def test_branch_leaves_the_run_alone_and_remembers_where_it_came_from(finished: Finished) -> None:
    whole = finished("whole")
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.name != ".lock"}
    go_on(whole, step=5, out=Path("branch"))
    assert_same_run(whole, Path("branch"))
    lineage = json.loads(Path("branch/lineage.json").read_text())
    assert (lineage["parent"], lineage["step"]) == ("whole", 5)
    assert lineage["checkpoint_sha256"] == file_digest(whole / "checkpoints" / "step-000005.ckpt")
    go_on(Path("branch"), out=Path("twig"), extra=1, settings={"optimizer": {"learning_rate": 1e-3}})
    assert json.loads(Path("twig/lineage.json").read_text())["parent_lineage"] == lineage
    assert [loss[0] for loss in losses(Path("twig"))] == list(range(1, 17))
    assert check(Path("twig"), step=15).exact
    after = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after


def test_newer_checkpoints_are_not_replaced_without_force(finished: Finished) -> None:
    folder = finished("run")
    with pytest.raises(UsageError, match="newer checkpoints") as error:
        go_on(folder, step=5, extra=1)
    assert "--out" in error.value.hint
    assert [file.step for file in RunFolder(folder).checkpoints()] == [0, 5, 10, 15]
    go_on(folder, step=5, extra=1, force=True)
    assert [file.step for file in RunFolder(folder).checkpoints()] == [0, 5, 6]


def test_damaged_newer_checkpoints_are_set_aside_not_deleted(finished: Finished) -> None:
    folder = finished("run")
    newest = folder / "checkpoints" / "step-000015.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    go_on(folder, step=10, until=12)
    assert [file.step for file in RunFolder(folder).checkpoints()] == [0, 5, 10, 12]
    assert Path(f"{newest}.damaged").is_file()
    assert not any(find_damage(file.path) for file in RunFolder(folder).checkpoints())


# --- the learning rate past the end ---------------------------------------------------------------

WSD = ScheduleConfig(name="wsd", warmup_steps=10, decay_start=80, decay_steps=20, min_learning_rate=0.1)
COSINE = ScheduleConfig(name="cosine", warmup_steps=10, decay_start=10, decay_steps=90, min_learning_rate=0.1)


@pytest.mark.parametrize("schedule", [WSD, COSINE])
def test_hold_keeps_the_schedule_and_stays_at_its_end(schedule: ScheduleConfig) -> None:
    held = continue_schedule(schedule, 1.0, 100, 150, "hold")
    assert held == schedule
    assert {learning_rate(step, 1.0, held) for step in range(101, 151)} == {0.1}


@pytest.mark.parametrize("schedule", [WSD, COSINE])
def test_extend_is_what_a_longer_plan_would_have_been(schedule: ScheduleConfig) -> None:
    extended = continue_schedule(schedule, 1.0, 60, 150, "extend")
    planned = schedule.model_copy(update={"decay_start": 130} if schedule is WSD else {"decay_steps": 140})
    assert extended == planned
    assert learning_rate(150, 1.0, extended) == pytest.approx(0.1)
    assert learning_rate(149, 1.0, extended) > 0.1


def test_extend_never_begins_to_decay_before_the_warmup_ends() -> None:
    long = WSD.model_copy(update={"decay_start": 16_000, "decay_steps": 4_000})
    extended = continue_schedule(long, 1.0, 50, 55, "extend")
    assert [learning_rate(step, 1.0, extended) for step in (5, 10)] == [0.5, 1.0]
    assert learning_rate(50, 1.0, extended) == pytest.approx(0.99, abs=0.01)


@pytest.mark.parametrize("schedule", [WSD, COSINE])
def test_rewarm_rises_from_the_rate_at_hand_and_falls_to_the_new_end(schedule: ScheduleConfig) -> None:
    again = continue_schedule(schedule, 1.0, 100, 200, "rewarm")
    rates = [learning_rate(step, 1.0, again) for step in range(101, 201)]
    top = max(rates)
    assert top == pytest.approx(1.0)
    assert 0.1 < rates[0] < 0.3
    assert rates[: rates.index(top)] == sorted(rates[: rates.index(top)])
    assert rates[-1] == pytest.approx(0.1)


def test_another_peak_takes_its_floor_along(make: Make) -> None:
    floor = {"min_learning_rate": 1.5e-3, "decay_start": 4, "decay_steps": 4}
    folder = run(make(schedule=floor, **with_steps(8)), "floor")
    shutil.copytree(folder, "chosen")
    notes = go_on(folder, extra=1, settings={"optimizer": {"learning_rate": 3e-4}})
    assert losses(folder)[-1][2] == pytest.approx(1.5e-4)
    assert any(isinstance(note, Note) and "min_learning_rate 0.0015 → 0.00015" in note.text for note in notes)
    both = {"optimizer": {"learning_rate": 3e-4}, "schedule": {"min_learning_rate": 1e-3}}
    with pytest.raises(
        InputError, match=r"min_learning_rate 0\.001 is above optimizer\.learning_rate 0\.0003"
    ):
        go_on(Path("chosen"), extra=1, settings=both)


def test_a_smaller_batch_lowers_the_micro_batch_of_a_resumed_run(finished: Finished) -> None:
    folder = finished("small")
    go_on(folder, extra=1, settings={"train": {"batch_size": 1}})
    assert RunFolder(folder).config().train.micro_batch_size == 1


def test_policies_are_exact_when_they_are_interrupted_again(make: Make) -> None:
    schedule = {"warmup_steps": 2, "decay_start": 3, "decay_steps": 3}
    one = run(make(schedule=schedule, **SHORT), "one")
    two = Path(shutil.copytree(one, "two"))
    go_on(one, until=14, policy="rewarm", settings={"checkpoint": {"every": 8}})
    go_on(two, until=14, policy="rewarm")
    go_on(two, step=10, until=14, force=True)
    assert losses(one) == losses(two)
    assert losses(one)[7][2] > losses(one)[5][2]
