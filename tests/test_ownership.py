"""What `--force`, `--out` and `--local-dir` replace: smolctl's own files, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolctl.durable import DiskError, file_digest, replacing
from smolctl.errors import UsageError
from smolctl.ownership import (
    RECORD,
    Record,
    building,
    put_in_place,
    read_record,
    remove_own_files,
    require_replaceable_file,
    write_record,
)
from tests.support.disks import small_disk
from tests.support.processes import Smolctl
from tests.support.tiny_runs import write_project

TRAIN = ("train", "tiny.yaml", "--steps", "1", "--force", "--out")
COMMANDS = {
    "train": TRAIN,
    "resume": ("resume", "runs/learned", "--extra", "1", "--force", "--out"),
    "quantize": ("quantize", "runs/llama", "--to", "int8", "--no-measure", "--force", "--out"),
    "push": ("push", "runs/llama", "--local-dir"),
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(autouse=True)
def _project(here: Path) -> None:
    (here / "corpus").unlink()
    write_project(here)


@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": "name: web", "thesis.md": "x"},
        {"config.yaml": "name: web"},
        {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"},
        {"README.md": "my project"},
        {"checkpoints/step-000001.ckpt": "mine"},
        {RECORD: "{}", "notes.txt": "x"},
        {RECORD: '{"kind": "run", "files": {"**": null}, "format": 99}', "notes.txt": "x"},
    ],
    ids=str,
)
def test_a_folder_that_smolctl_has_not_written_is_left_alone(
    files: dict[str, str], here: Path, smolctl: Smolctl
) -> None:
    for name, text in files.items():
        (here / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "mine" / name).write_text(text)
    before = contents(here)
    for command in COMMANDS.values():
        called = smolctl(*command, "mine")
        assert called.code == 2, command
        assert "mine is not replaced" in called.err
        assert contents(here) == before


@pytest.mark.parametrize("command", [*COMMANDS, "gguf"])
@pytest.mark.parametrize("place", ["file", "file/new", "file/new/out", "circle", "circle/out"])
def test_where_no_folder_can_be_is_a_wrong_option(
    command: str, place: str, here: Path, smolctl: Smolctl
) -> None:
    (here / "file").touch()
    (here / "circle").symlink_to("circle")
    asked = COMMANDS.get(command, ("quantize", "runs/llama", "--to", "gguf-q8_0", "--no-measure", "--out"))
    called = smolctl(*asked, place)
    assert called.code == 2, called.err
    assert re.search("is a file, not a folder|its links form a loop", called.err)


@pytest.mark.parametrize("command", ["train", "push"])
def test_the_working_folder_is_left_alone(command: str, here: Path, smolctl: Smolctl) -> None:
    before = contents(here)
    called = smolctl(*COMMANDS[command], ".")
    assert called.code == 2
    reason = {"train": "it is not a run that smolctl wrote", "push": "this command reads runs/llama"}
    assert reason[command] in called.err
    assert contents(here) == before


@pytest.mark.parametrize(
    "command",
    [
        ("resume", "runs/learned@5", "--extra", "1", "--force", "--out"),
        ("resume", "runs/learned/checkpoints/step-000005.ckpt", "--extra", "1", "--force", "--out"),
        ("train", "tiny.yaml", "--init-from", "runs/learned@5", "--steps", "1", "--force", "--out"),
        ("train", "tiny.yaml", "--tokenizer", "runs/learned", "--steps", "1", "--force", "--out"),
        ("quantize", "runs/learned", "--to", "int8", "--no-measure", "--force", "--out"),
        ("push", "runs/learned", "--local-dir"),
    ],
    ids=" ".join,
)
def test_no_command_replaces_what_it_reads(command: tuple[str, ...], here: Path, smolctl: Smolctl) -> None:
    same = ("runs/learned", "runs/../runs/learned", "link", "runs/latest", f"{here}/runs/learned")
    (here / "link").symlink_to("runs/learned")
    (here / "runs" / "latest").unlink(missing_ok=True)
    (here / "runs" / "latest").symlink_to("learned")
    before = contents(here)
    for target in (*same, "runs", "."):
        assert smolctl(*command, target).code == 2, target
        assert contents(here) == before


def test_a_run_is_replaced_and_what_others_have_put_into_it_stays(here: Path, smolctl: Smolctl) -> None:
    assert smolctl(*TRAIN, "out").code == 0
    assert smolctl("quantize", "out", "--to", "int8,gguf-q8_0", "--no-measure").code in (0, 3)
    assert smolctl("quantize", "runs/llama", "--to", "int8", "--no-measure", "--out", "out/mine").code == 0
    strange = [
        f"{place}/notes.md" for place in ("checkpoints", "logs", "tokenizer", "quantized", "quantized/int8")
    ]
    strange += ["notes.md", "checkpoints/step-1.ckpt.bak", "sub/config.yaml"]
    for name in strange:
        (here / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "out" / name).write_text("mine")
    other = contents(here / "out" / "mine")
    called = smolctl(*TRAIN, "out", "--seed", "5")
    assert called.code == 0
    assert "notes.md" in called.err
    after = contents(here / "out")
    assert {name: after[name] for name in strange} == dict.fromkeys(strange, b"mine")
    assert contents(here / "out" / "mine") == other
    assert {name for name in after if name.endswith(".ckpt") and "mine/" not in name} == {
        *(f"checkpoints/{name}.ckpt" for name in ("step-000000", "step-000001", "final"))
    }
    assert not (here / "out" / "quantized" / "int8" / "model.safetensors").exists()


def test_a_quantized_model_is_replaced_and_what_others_have_put_into_it_stays(
    here: Path, smolctl: Smolctl
) -> None:
    command = (*COMMANDS["quantize"], "out")
    assert smolctl(*command).code == 0
    (here / "out" / "notes.md").write_text("mine")
    (here / "out" / "sub").mkdir()
    (here / "out" / "sub" / "model.safetensors").write_text("mine")
    called = smolctl("quantize", "runs/llama", "--to", "int4", "--no-measure", "--force", "--out", "out")
    assert called.code == 0
    assert "notes.md" in called.err
    assert (here / "out" / "notes.md").read_text() == "mine"
    assert (here / "out" / "sub" / "model.safetensors").read_text() == "mine"
    assert "int4" in smolctl("inspect-config", "out").out


def test_a_gguf_is_replaced_only_when_smolctl_wrote_it(here: Path, smolctl: Smolctl) -> None:
    command = ("quantize", "runs/llama", "--to", "gguf-q8_0", "--no-measure", "--out", "out")
    assert smolctl(*command).code == 0
    (written,) = (here / "out").iterdir()
    assert smolctl(*command).code == 2
    assert smolctl(*command, "--force").code == 0
    for foreign in (b"my notes", b"GGUF", b""):
        written.write_bytes(foreign)
        assert smolctl(*command, "--force").code == 2
        assert written.read_bytes() == foreign


@pytest.mark.parametrize("option", ["--save", "--plot"])
@pytest.mark.parametrize("content", ["my notes", "{}", ""])
def test_bench_replaces_only_its_own_files(option: str, content: str, here: Path, smolctl: Smolctl) -> None:
    (here / "mine").write_text(content)
    called = smolctl("bench", "runs/llama", "--suite", "load", "--repeats", "1", option, "mine")
    assert called.code == 2
    assert (here / "mine").read_text() == content


@pytest.fixture
def read_only(here: Path) -> Iterator[Path]:
    """A disk that even root cannot write."""
    with small_disk(here / "disk", "64k") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield disk


WRITERS = {
    **COMMANDS,
    "gguf": ("quantize", "runs/llama", "--to", "gguf-f16", "--no-measure", "--out"),
    "page": ("push", "runs/llama", "--page"),
    "save": ("bench", "runs/llama", "--suite", "load", "--repeats", "1", "--save"),
    "plot": ("bench", "runs/llama", "--suite", "load", "--repeats", "1", "--plot"),
    "answers": ("sample", "runs/llama", "--jsonl", "prompts.jsonl", "--resume-output"),
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_destination_that_cannot_be_written_is_refused_before_the_work(
    command: str, read_only: Path, smolctl: Smolctl
) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n')
    called = smolctl(*WRITERS[command], read_only / "new")
    assert called.code == 1
    cause, remedy = called.err.splitlines()  # and no word of progress
    assert cause == f"error: {read_only}: cannot be written (Read-only file system)"
    assert remedy.startswith(" hint: ")
    assert called.out == ""


def test_a_run_without_a_name_is_refused_before_the_work_where_it_cannot_be_written(
    here: Path, read_only: Path, smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(read_only)
    called = smolctl("train", here / "tiny.yaml", "--data", here / "notes.txt")
    assert called.code == 1
    assert f"{read_only}: cannot be written" in called.err
    assert "--out" in called.err
    assert len(called.err.splitlines()) == 2


def test_bench_needs_no_folder_that_can_be_written(
    here: Path, read_only: Path, smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(read_only)
    called = smolctl("bench", here / "runs/llama", "--suite", "load", "--repeats", "1", "--json")
    assert called.code == 0, called.err
    assert any("the working folder cannot be written" in note for note in called.json["notes"])


def test_a_chart_that_cannot_be_written_leaves_the_old_one(here: Path, smolctl: Smolctl) -> None:
    with small_disk(here / "disk", "64k") as disk:
        command = ("bench", "runs/llama", "--suite", "load", "--repeats", "1", "--plot", disk / "chart.png")
        assert smolctl(*command).code == 0
        before = (disk / "chart.png").read_bytes()
        with pytest.raises(OSError, match="No space left"):
            (disk / "ballast").write_bytes(bytes(65536))
        called = smolctl(*command)
        assert called.code == 1
        assert "chart.png: the chart cannot be written" in called.err
        assert sorted(path.name for path in disk.iterdir()) == ["ballast", "chart.png"]
        assert (disk / "chart.png").read_bytes() == before


def test_a_local_dir_is_written_again_unless_somebody_has_edited_it(here: Path, smolctl: Smolctl) -> None:
    command = (*COMMANDS["push"], "out")
    assert smolctl(*command, "--gguf", "q8_0").code == 0
    assert smolctl(*command).code == 0
    assert not list(Path("out").glob("*.gguf"))
    card = Path("out/README.md")
    edited = card.read_text() + "\nMine."
    card.write_text(edited)
    before = contents(here)
    called = smolctl(*command)
    assert called.code == 3
    assert "README.md, which was edited" in called.err
    assert contents(here) == before


def test_what_lies_behind_a_link_is_left_alone(here: Path, smolctl: Smolctl) -> None:
    assert smolctl(*TRAIN, "out").code == 0
    shutil.move(here / "out" / "checkpoints", here / "elsewhere")
    (here / "out" / "checkpoints").symlink_to(here / "elsewhere")
    before = contents(here)
    called = smolctl(*TRAIN, "out")
    assert called.code == 2
    assert "link" in called.err
    assert contents(here) == before


def test_an_empty_folder_and_a_link_to_one_are_free(here: Path, smolctl: Smolctl) -> None:
    (here / "empty").mkdir()
    (here / "link").symlink_to("empty")
    assert smolctl(*TRAIN[:-2], "--out", "link").code == 0
    record = read_record(here / "empty")
    assert record is not None
    assert record.kind == "run"


def test_a_file_whose_folder_is_missing_is_refused_before_the_work(tmp_path: Path) -> None:
    target = tmp_path / "none" / "x.json"
    with pytest.raises(UsageError, match="none is not a folder"):
        require_replaceable_file(target, "--save", force=True, reads=(), is_own=bool)


def test_of_two_processes_that_write_the_same_place_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "written").mkdir()
    folder, file = tmp_path / "written/folder", tmp_path / "written/file"
    with building(folder) as built:
        (built / "name").write_text("the first")
        with pytest.raises(DiskError, match="folder: another process is writing it"), building(folder):
            pass
        put_in_place(built, folder)
    assert (folder / "name").read_text() == "the first"
    with replacing(file) as partial:
        partial.write_text("the first")
        with pytest.raises(DiskError, match="file: another process is writing it"), replacing(file):
            pass
    assert file.read_text() == "the first"
    assert sorted((tmp_path / "written").iterdir()) == [file, folder]


def test_a_record_names_files_part_by_part(tmp_path: Path) -> None:
    record = Record("run", dict.fromkeys(("a.txt", "c/step-*.ckpt", "logs/csv/**", "q/*/")))
    for ours in (RECORD, "a.txt", "c/step-1.ckpt", "logs/csv/x", "logs/csv/deep/x"):
        assert record.names(ours), ours
    for theirs in ("b/a.txt", "c/step-1.ckpt/x", "c/d/step-1.ckpt", "step-1.ckpt", "logs/x", "q/x", "q/x/y"):
        assert not record.names(theirs), theirs
    assert record.names("q/int8", is_folder=True)
    assert not record.names("q", is_folder=True)
    place = tmp_path / "place"
    for name in ("empty", "c"):
        (place / name).mkdir(parents=True)
    write_record(place, record)
    (place / "c" / "step-1.ckpt").touch()
    assert remove_own_files(place) == ()
    assert [path.name for path in place.iterdir()] == ["empty"]  # it may be somebody's


def test_the_record_says_what_wrote_it(here: Path, smolctl: Smolctl) -> None:
    ids = set()
    for command, kind in (("train", "run"), ("quantize", "quantized model"), ("push", "repository")):
        assert smolctl(*COMMANDS[command], command).code == 0
        record = json.loads((here / command / RECORD).read_text())
        assert record["kind"] == kind
        assert record["version"]
        ids.add(record["id"])
    assert len(ids) == 3
    plan = smolctl("push", "train", "--dry-run", "--json").json
    planned = {file["path"]: file["sha256"] for file in plan["repo"]["files"]}
    assert planned[RECORD] != file_digest(here / "train" / RECORD)  # that one is the run's


def test_a_record_of_a_later_version_is_read(tmp_path: Path) -> None:
    write_record(tmp_path, Record("run", {"config.yaml": None}))
    path = tmp_path / RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))
    record = read_record(tmp_path)
    assert record is not None
    assert record.names("config.yaml")
    damages: list[dict[str, object]] = [{"files": {"a": 5}}, {"files": 5}, {"kind": []}, {"format": 10**400}]
    for damage in damages:
        path.write_text(json.dumps({"kind": "run", "files": {}, **damage}))
        assert read_record(tmp_path) is None
