"""A run folder's records after a crash, and its names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from smolctl.errors import InputError, UsageError
from smolctl.ownership import strange_files
from smolctl.runs.checkpoint_file import find_damage
from smolctl.runs.events import Candidate, Prediction, Step
from smolctl.runs.folder import RunFolder
from smolctl.runs.retention import clear_after
from smolctl.runs.root import make_latest
from smolctl.sources import open_source
from smolctl.training.resume import ResumeOptions
from smolctl.training.verify import verify
from tests.support.processes import Called
from tests.support.tiny_runs import assert_same_run, go_on, prepare_tiny, run, with_steps, write_corpus


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kept", [20, *(pytest.param(kept, marks=pytest.mark.slow) for kept in (1, -2))])
@pytest.mark.parametrize("name", ["metrics.jsonl", "predictions.jsonl"])
def test_a_line_that_a_crash_has_cut_off_costs_nothing(
    name: str, kept: int, finished: Callable[[str], Path], whole: Path
) -> None:
    folder = finished("cut")
    path = folder / name
    last = path.read_text().splitlines()[-1]
    with path.open("a") as file:  # as kill -9 leaves it: the record of a step to come, without its end
        file.write(last[:kept])
    run_folder = RunFolder(folder)
    assert [record["step"] for record in run_folder.metrics() if record["event"] == "step"] == [*range(1, 16)]
    assert len(run_folder.predictions()) == 2
    result = verify(folder, ResumeOptions(), lambda _event: None)
    assert result.exact
    assert result.losses == 5
    go_on(folder, step=10, until=15, force=True)
    assert_same_run(whole, folder)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_everything_that_a_run_writes_has_its_name_in_one_place(smolctl: Callable[..., Called]) -> None:
    logged = {"train": {"steps": 1}, "trainer": {"loggers": ["csv"]}}
    folder = run(prepare_tiny(write_corpus(Path("corpus")), **logged), "run")
    assert smolctl("quantize", folder, "--to", "int8", "--no-measure").code == 0
    go_on(folder, extra=1)
    go_on(folder, out=Path("branch"), extra=1)
    assert strange_files(folder) == strange_files(Path("branch")) == ()


def test_the_last_checkpoint_is_called_final_as_long_as_it_is_the_last() -> None:
    folder = run(prepare_tiny(write_corpus(Path("corpus")), **with_steps(5)), "run")
    final = folder / "checkpoints" / "final.ckpt"
    assert final.samefile(folder / "checkpoints" / "step-000005.ckpt")
    assert [file.step for file in RunFolder(folder).checkpoints()] == [0, 5]
    go_on(folder, extra=2)
    assert final.samefile(folder / "checkpoints" / "step-000007.ckpt")


def test_a_final_checkpoint_that_is_a_copy_is_kept(finished: Callable[[str], Path]) -> None:
    copied = finished("copied")  # copies hard links as files of their own
    step = copied / "checkpoints" / "step-000015.ckpt"
    step.write_bytes(step.read_bytes()[:-100])
    go_on(copied, step=10, until=11)
    assert find_damage(copied / "checkpoints" / "step-000015.ckpt.damaged")
    assert not find_damage(copied / "checkpoints" / "final.ckpt.kept")


def test_of_a_copied_run_no_checkpoint_is_kept_twice(finished: Callable[[str], Path]) -> None:
    copied = finished("copied")
    clear_after(RunFolder(copied), 15, force=False)
    assert not list((copied / "checkpoints").glob("final*"))


def test_final_is_the_last_checkpoint_where_the_name_of_its_step_is_gone(
    finished: Callable[[str], Path],
) -> None:
    folder = finished("run")
    for path in (folder / "checkpoints").glob("step-000015.ckpt*"):
        path.unlink()
    run_folder = RunFolder(folder)
    assert [file.step for file in run_folder.checkpoints()] == [0, 5, 10, 15]
    assert open_source(str(folder)).step == 15
    with pytest.raises(UsageError, match=r"newer checkpoints \(up to step 15\)"):
        clear_after(run_folder, 10, force=False)
    again = run_folder.under_its_step(run_folder.checkpoint())
    clear_after(run_folder, 15, force=False)
    assert again.path == run_folder.checkpoint_path(15)
    assert not again.damage
    assert Path(f"{again.path}.sha256").read_text().endswith("  step-000015.ckpt\n")


def test_an_event_of_any_kind_finds_its_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.record(Step(1, None, 1e-3, None, 10, 0.1, 100.0, 1.0, None, None, skipped=1))
    folder.record(Prediction(1, "p", "text", None, ()))
    assert [record["skipped"] for record in folder.metrics()] == [1]
    folder.draw_loss()  # of a run whose only step has overflowed
    assert list(folder.predictions()) == ["p"]


LATER = {
    "an event that is not known": {"event": "dream", "step": 2, "loss": 1.0},
    "another type of a value": {"event": "step", "step": 2, "loss": {"mean": 1.0}},
    "a key that is gone": {"event": "validation", "step": 2},
    "a step that is none": {"event": "step", "step": 10**30, "loss": 1.0},
    "nothing of ours": [1, 2],
    "a number without end": {"event": "step", "step": 2, "loss": 10**400},
}


@pytest.mark.parametrize("kind", LATER)
def test_a_record_of_a_later_version_stops_nobody(kind: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.record(Step(1, 2.0, 1e-3, None, 10, 0.1, 100.0, 1.0, None, None))
    folder.record(Prediction(1, "p", "text", None, (Candidate("a", 0.5),)))
    for name in ("metrics.jsonl", "predictions.jsonl"):
        path = tmp_path / name
        known = {**json.loads(path.read_text()), "colour": {"of": "a later version"}}
        if name == "predictions.jsonl":
            known["top"][0]["rank"] = 1
        path.write_text("".join(json.dumps(record) + "\n" for record in (known, LATER[kind])))
    assert [(record["step"], record["loss"]) for record in folder.metrics()] == [(1, 2.0)]
    assert [one.text for one in folder.predictions()["p"]] == ["text"]
    folder.write_predictions()
    folder.keep_records(5)
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept[0]["colour"], "what a later version has recorded stays in the file"


@pytest.mark.parametrize(
    "content", ["[]", "{", "[" * 5_000, '{"packages": 5}', '{"devices": {"a": 1}}', '{"earlier": 5}']
)
def test_an_environment_that_cannot_be_read_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(content)
    folder = RunFolder(tmp_path)
    assert folder.environment() == {}
    folder.update_environment({"device": "cpu"})
    assert json.loads((tmp_path / "environment.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_an_environment_that_cannot_be_read_is_kept_beside_the_new_one(content: str, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(content)
    RunFolder(tmp_path).update_environment({"device": "cpu"})
    RunFolder(tmp_path).update_environment({"device": "cuda"})
    assert RunFolder(tmp_path).environment()["earlier"] == [{"device": "cpu"}]
    assert (tmp_path / "environment.json.damaged").read_text() == content


def test_a_folder_in_the_place_of_the_newest_run_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "runs/latest").mkdir(parents=True)
    (tmp_path / "runs/nano-001").mkdir()
    with pytest.raises(OSError, match="directory"):
        make_latest(Path("runs/nano-001"))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["latest", "nano-001"]


def test_what_a_killed_process_had_begun_to_write_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    names = (".config.yaml.partial", "checkpoints/.step-000500.ckpt.partial", "tokenizer/.x.json.partial")
    kept = ("checkpoints/step-000400.ckpt", "notes.partial", "checkpoints/.mine")
    for name in (*names, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with run.lock(lambda _event: None):
        assert not any((tmp_path / name).exists() for name in names)
        assert all((tmp_path / name).exists() for name in kept)
        (tmp_path / names[0]).touch()  # which this process is writing
        with pytest.raises(InputError), RunFolder(tmp_path).lock(lambda _event: None):
            pass
        assert (tmp_path / names[0]).exists()
