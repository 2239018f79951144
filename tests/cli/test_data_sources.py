"""What `train` says of the data: which is meant by a name, what was read, what was met in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Smolctl
from tests.support.tiny_runs import write_project


@pytest.fixture(autouse=True)
def _tiny_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, train={"steps": 2}, predictions={"every": 0}, validation={"every": 0})


def plan_of(smolctl: Smolctl, *arguments: str) -> tuple[dict[str, Any], list[str]]:
    done = smolctl("train", *arguments, "--dry-run", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    return document["plan"], document["notes"]


def write_rows(path: str, field: str, texts: list[str | None]) -> None:
    Path(path).write_text("".join(json.dumps({field: text}) + "\n" for text in texts))


def test_what_was_read_stands_in_the_plan_and_in_the_record_of_the_run(smolctl: Smolctl) -> None:
    Path("corpus/page.html").write_text("<p>")
    Path("corpus/empty.txt").touch()
    Path("corpus/zz.txt").write_text("the cat <|endoftext|> <|im_start|>sat<|im_end|> " * 27)
    expected = [
        "corpus: read 32 files, skipped 1: .html 1.",
        "Empty texts, left out: 1.",
        "Special tokens spelled in the text: 81, read as ordinary text "
        "(data.special_tokens=tokens makes them control tokens).",
    ]
    assert plan_of(smolctl, "tiny.yaml")[0]["read"] == expected
    for _ in ("tokenized", "from the cache"):
        done = smolctl("train", "tiny.yaml")
        assert "skipped 1: .html 1" in done.out
        assert "81, read as ordinary text" in " ".join(done.out.split())
        assert json.loads(Path("runs/latest/environment.json").read_text())["data"] == expected
    meant, _ = plan_of(smolctl, "tiny.yaml", "--set", "data.special_tokens=tokens")
    assert "81, read as control tokens" in meant["read"][2]
    assert meant["corpus_tokens"] < plan_of(smolctl, "tiny.yaml")[0]["corpus_tokens"]


def test_null_texts_are_left_out_and_counted(smolctl: Smolctl) -> None:
    write_rows("a.jsonl", "text", ["the cat sat " * 30, None, "", "on a mat " * 30])
    assert plan_of(smolctl, "tiny.yaml", "--data", "a.jsonl")[0]["read"] == ["Empty texts, left out: 2."]


def test_each_source_has_its_text_field_and_a_mixture_its_epochs(smolctl: Smolctl) -> None:
    write_rows("a.jsonl", "content", ["the cat sat " * 30] * 9)
    write_rows("b.jsonl", "body", ["on a mat and saw " * 300] * 9)
    both = ("tiny.yaml", "--data", "a.jsonl", "--data", "b.jsonl", "--set", "data.text_field=[content, body]")
    assert plan_of(smolctl, *both)[0]["corpus_tokens"] > 0
    _, notes = plan_of(smolctl, *both, "--set", "data.weights=[9, 1]", "--steps", "500")
    shares = [note for note in notes if "of the samples" in note]
    assert shares[0].startswith("a.jsonl: 90.0% of the samples, ")
    epochs = [float(note.split("of the samples, ")[1].split(" epochs")[0]) for note in shares]
    assert epochs[0] > 10 > 1 > epochs[1] > 0
    one = smolctl("train", *both[:3], *both[5:], "--dry-run")
    assert one.code == 3
    assert "text_field has 2 entries for 1 sources" in one.err


def test_a_split_of_local_files_is_refused(smolctl: Smolctl) -> None:
    done = smolctl("train", "tiny.yaml", "--set", "data.split=train_sft")
    assert done.code == 3
    assert "only Hub datasets have splits" in done.err


def test_a_folder_of_a_presets_or_a_corpus_name_is_not_confused_with_it(smolctl: Smolctl) -> None:
    for name in ("python", "nano", "smollm2-135m"):
        Path("corpus").rename(name) if name == "python" else Path(name).mkdir()
    tiny = ("--set", "data.sequence_length=16", "--set", "tokenizer=train:300", "--steps", "1")
    plan, notes = plan_of(smolctl, "nano", "--data", "./python", *tiny)
    assert f"nano is the preset; the folder {Path('nano').absolute()} is not used." in notes
    assert plan["read"] == ["./python: read 30 files."]
    assert json.loads(smolctl("count-params", "smollm2-135m", "--json").out)["unique"] == 135_104_832
    done = smolctl("train", "./nano")
    assert done.code == 3
    assert "./nano: this is a folder, not a config" in done.err
    assert "--data ./nano" in done.err


def test_the_built_in_corpus_is_told_from_a_folder_of_its_name() -> None:
    from smolctl.config.data import DataConfig
    from smolctl.data.text.corpus import open_sources

    assert open_sources(DataConfig())[0].read_as == "python: the built-in corpus."
    Path("python").mkdir()
    assert "not the file or folder of that name" in open_sources(DataConfig())[0].read_as
    assert open_sources(DataConfig())[0].read_as.endswith("write ./python for that.")
