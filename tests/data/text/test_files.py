"""Which files of a folder are read, and what is said of the others."""

from __future__ import annotations

import gzip
import os
from itertools import chain
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from smolctl.data.text.files import describe_files, find_files, read_file
from smolctl.errors import InputError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)


def found(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_files(folder).files]


def test_text_and_code_are_read_whatever_the_case_and_the_packing(tmp_path: Path) -> None:
    names = ["B.TXT", "a.txt", "c.Md", "d.js", "e.C", "sub/f.rs", "sub/g.JSONL", "sub/h.ipynb.rs"]
    packed = ["i.md.gz", "j.PY.XZ", "k.txt.bz2"]
    make(tmp_path, *names, *packed)
    assert sorted(found(tmp_path)) == sorted(names + packed)
    assert found(tmp_path) == sorted(found(tmp_path), key=Path)
    assert find_files(tmp_path).skipped == {}


def test_what_is_not_read_is_counted_by_its_reason(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b.html", "sub/c.HTML", "d.csv", "e.json", "LICENSE", ".git/f.txt", ".g.txt")
    (tmp_path / "h.parquet.gz").touch()
    (tmp_path / "i.txt").symlink_to("nothing")
    os.mkfifo(tmp_path / "j.txt")
    files = find_files(tmp_path)
    assert files.skipped == {
        ".html": 2,
        ".csv": 1,
        ".json": 1,
        "without a file extension": 1,
        "hidden": 2,
        ".gz": 1,
        "broken link": 1,
        "not a regular file": 1,
    }
    assert describe_files(str(tmp_path), files) == (
        f"{tmp_path}: read 1 file, skipped 10: .html 2, hidden 2, .csv 1, .gz 1, .json 1, broken link 1, "
        "not a regular file 1, without a file extension 1."
    )


def test_links_are_followed_and_nothing_is_read_twice(tmp_path: Path) -> None:
    make(tmp_path, "corpus/a.txt", "elsewhere/b.txt", "elsewhere/c.md")
    (tmp_path / "corpus" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "loop").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "z.txt").symlink_to("a.txt")
    assert found(tmp_path / "corpus") == ["a.txt", "folder/b.txt", "folder/c.md"]
    assert find_files(tmp_path / "corpus").skipped == {"found twice": 2}


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="no rights of this kind on this system")
def test_unreadable_files_and_folders_are_named(somebody: Path) -> None:
    make(somebody, "a.txt", "b.txt", "closed/c.txt", "listed/d.txt")
    (somebody / "b.txt").chmod(0)
    (somebody / "closed").chmod(0)
    (somebody / "listed").chmod(0o400)  # its names can be read, its files cannot
    assert found(somebody) == ["a.txt"]
    assert find_files(somebody).skipped == {"unreadable": 3}


def test_named_files_are_read_whatever_they_are_called(tmp_path: Path) -> None:
    make(tmp_path, "a.html", "b.txt")
    page = find_files(tmp_path / "a.html")
    assert page.files == (tmp_path / "a.html",)
    assert describe_files("a.html", page) == "a.html: read as plain text."
    assert describe_files("b.txt", find_files(tmp_path / "b.txt")) == ""


def test_what_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: neither a file nor a folder") as caught:
        find_files(tmp_path / "pipe")
    assert "save it" in caught.value.hint


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc on this system")
@pytest.mark.parametrize("name", ["/proc", "/proc/self/environ", "/proc/kmsg"])
def test_what_the_kernel_makes_up_is_refused_and_skipped(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a file nor a folder"):
        find_files(Path(name))
    make(tmp_path, "a.txt", "b.txt")
    (tmp_path / "b.txt").write_text("")  # an empty file is a file
    (tmp_path / "made-up.txt").symlink_to(name)
    assert found(tmp_path) == ["a.txt", "b.txt"]
    assert find_files(tmp_path).skipped == {"not a regular file": 1}


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".txt.gz", ".parquet"])
def test_a_file_that_is_written_while_it_is_read_is_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{ending}"
    if ending == ".parquet":
        parquet.write_table(pyarrow.table({"text": ["the cat"] * 600}), path)
    else:
        text = b'{"text": "the cat"}\n' * 200_000
        path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)

    def write(_read: int) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    with pytest.raises(InputError, match="changed while it was read"):
        list(chain.from_iterable(document.chunks for document in read_file(path, "text", write)))


def test_folders_with_nothing_to_read_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no text in this folder \(it is empty\)"):
        find_files(tmp_path)
    make(tmp_path, "a.csv", "b.csv")
    with pytest.raises(InputError, match=r"no text in this folder \(skipped 2: \.csv 2\)"):
        find_files(tmp_path)
