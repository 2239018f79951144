"""The cache: its size, and what is deleted of it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from smolctl.config.data import DataConfig
from smolctl.data.cached import DAY, list_cache
from smolctl.data.tokenizer.tokenizer import train_tokenizer
from smolctl.data.tokens.cache import MANIFEST, lock_of, remove_leftovers, whole_or_absent
from smolctl.data.tokens.corpus import tokenize_corpus
from smolctl.durable import cache_folder
from tests.support.processes import Smolctl

TEXT = "Once upon a time there was a cat.\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokens of old.txt, used 40 days ago, and of new.txt, used today."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path / "cache"))
    tokenizer = train_tokenizer(iter([TEXT * 3]), 300)
    for name in ("old", "new"):
        Path(f"{name}.txt").write_text(f"{name} {TEXT}" * 50)
        config = DataConfig(source=(f"{name}.txt",), sequence_length=16)
        (folder,) = tokenize_corpus(config, tokenizer).folders
        if name == "old":
            days_ago = time.time() - 40 * DAY
            os.utime(folder / MANIFEST, (days_ago, days_ago))
    return tmp_path / "cache"


def contents(entries: list[dict[str, object]]) -> set[object]:
    return {entry["content"] for entry in entries} - {"a trained tokenizer"}


def test_the_cache_is_shown_with_its_size(cache: Path, smolctl: Smolctl) -> None:
    shown = smolctl("cache", "--json").json
    assert shown["path"] == str(cache)
    assert contents(shown["entries"]) == {
        f"tokens of {Path(name).absolute()}" for name in ("old.txt", "new.txt")
    }
    stored = sum(
        path.stat().st_size
        for part in ("tokens", "tokenizers")
        for path in (cache / part).rglob("*")
        if path.is_file()
    )
    assert shown["bytes"] == stored == sum(entry["bytes"] for entry in shown["entries"])
    lines = smolctl("cache").out.splitlines()
    assert any("40 days ago" in line for line in lines)
    assert "old.txt" in "".join("".join(lines).split())  # a long path takes more than a line
    assert lines[-1].startswith(f"{cache}: ")


def test_what_was_not_used_is_deleted_and_nothing_else(cache: Path, smolctl: Smolctl) -> None:
    (cache / "mine.txt").write_text("not ours")
    pruned = smolctl("cache", "--prune", "30", "--json").json
    assert contents(pruned["removed"]) == {f"tokens of {Path('old.txt').absolute()}"}
    assert contents(pruned["entries"]) == {f"tokens of {Path('new.txt').absolute()}"}
    for path in (cache / "tokens").rglob("*"):  # written before the clock was set back
        os.utime(path, (time.time() + 1e6,) * 2)
    assert smolctl("cache", "--prune", "0", "--json").json["entries"] == []
    assert (cache / "mine.txt").read_text() == "not ours"
    assert smolctl("cache").code == 0


def test_what_another_process_builds_is_left_alone(cache: Path, smolctl: Smolctl) -> None:
    folder = next(path for path in (cache / "tokens").glob("*") if path.is_dir())
    partial = folder.with_name(f"{folder.name}-01234567.partial")
    partial.mkdir()
    with lock_of(folder).acquire(timeout=0):
        assert len(contents(smolctl("cache", "--prune", "0", "--json").json["entries"])) == 1
        assert partial.is_dir()
    assert smolctl("cache", "--prune", "0", "--json").json["entries"] == []
    assert not partial.exists()


def test_an_empty_cache_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smolctl: Smolctl
) -> None:
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path / "nothing"))
    assert smolctl("cache").out == f"{tmp_path / 'nothing'}: 0 B\n"


def test_folders_that_others_build_at_the_same_moment_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path))
    tokens = cache_folder() / "tokens"
    done = threading.Event()

    def build_again_and_again() -> None:
        folder = tokens / ("ab" * 16)
        tokens.mkdir(parents=True)
        with lock_of(folder).acquire():
            while not done.is_set():
                with whole_or_absent(folder) as partial:
                    for number in range(20):
                        (partial / f"{number}.partial").touch()

    builder = threading.Thread(target=build_again_and_again)
    builder.start()
    try:
        for _ in range(150):
            remove_leftovers(tokens)
            list_cache()
    finally:
        done.set()
        builder.join()


def test_without_a_home_folder_only_what_needs_the_cache_asks_for_one(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smolctl: Smolctl
) -> None:
    monkeypatch.delenv("SMOLCTL_CACHE")
    monkeypatch.setenv("HOME", "~")  # as if it were not known
    assert smolctl("sample", "runs/llama", "--prompt", "the", "--max-tokens", 1).code == 0
    for command in (("cache",), ("compare", "runs/llama", "runs/learned")):
        called = smolctl(*command)
        assert called.code == 1, called.err
        assert "the home folder is not known" in called.err
        assert "hint: Set HOME, or SMOLCTL_CACHE" in called.err
    monkeypatch.setenv("SMOLCTL_CACHE", "~nobody-of-this-name/cache")
    assert "the home folder is not known" in smolctl("cache").err
    called = smolctl("train", "nano", "--data", "~nobody-of-this-name/notes", "--dry-run")
    assert called.code == 3
    assert "error: ~nobody-of-this-name/notes: no such file or folder" in called.err
