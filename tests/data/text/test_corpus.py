"""Documents out of files, folders and the embedded corpus."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from smolctl.config.data import DataConfig
from smolctl.data.text.corpus import iter_texts, open_sources, pin_sources
from smolctl.data.text.documents import Document, OnRead, cut
from smolctl.errors import ExitCode, InputError, MissingPackageError
from smolctl.extras import install_command

# The cases that a cut could spoil: runs of white space, contractions, digits, marks, wide spaces.
SPITEFUL = st.text(
    st.sampled_from(
        [*"\n\n\n\n  \t\r\v\x1c\x85\xa0\u2028\u3000", *"ab'sdtl", *"019²½", *".!-<|>", *"é\u0301界🎉ß\u200d"]
    ),
    max_size=80,
)


def zstd(content: bytes) -> bytes:
    """A zstd frame with a checksum, as the command line tool writes it."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: 1})
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstd,
}
NAMES = {"gz": "gzip", "bz2": "bzip2", "zst": "zstd"}


def iter_documents(
    names: list[str], text_field: str = "text", on_read: OnRead = lambda _: None
) -> Iterator[Document]:
    for source in open_sources(DataConfig(source=tuple(names), text_field=text_field)):
        yield from source.read(on_read)


def read(*sources: Path | str, text_field: str = "text") -> list[str]:
    return ["".join(doc.chunks) for doc in iter_documents([str(source) for source in sources], text_field)]


def refused(*sources: Path | str, text_field: str = "text") -> InputError:
    with pytest.raises(InputError) as caught:
        read(*sources, text_field=text_field)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert caught.value.hint
    return caught.value


def test_safe_cuts_are_found() -> None:
    text = "one\ntwo\n\nthree\n four\nfive six  seven"
    assert list(cut([text], 1)) == ["one\n", "two\n\nthree\n four\n", "five", " six  seven"]


@given(chunks=st.lists(SPITEFUL, max_size=6), size=st.integers(1, 8), longest=st.integers(8, 20))
def test_no_piece_is_longer_than_the_limit(chunks: list[str], size: int, longest: int) -> None:
    pieces = list(cut(chunks, size, longest))
    assert "".join(pieces) == "".join(chunks)
    assert all(0 < len(piece) <= longest for piece in pieces)


def test_text_without_a_safe_place_is_cut_before_white_space() -> None:
    pieces = list(cut(["word  " * 100], size=20, longest=64))
    assert len(pieces) > 1
    assert all(piece[0] == " " for piece in pieces[1:])


def test_python_corpus_has_sources_and_documentation() -> None:
    names, size = [], 0
    for document in iter_documents(["python"]):
        names.append(document.name)
        size += sum(len(piece.encode()) for piece in document.chunks)
    assert size > 5_000_000
    assert "python:json/decoder.py" in names
    assert "python:help/assert" in names
    assert not [name for name in names if "/test/" in name or "site-packages" in name]
    assert names == [document.name for document in iter_documents(["python"])]


def test_files_and_folders_are_read_in_order_and_hidden_files_are_not(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", "sub/c.rst", "sub/d.py", ".hidden.txt", ".git/e.txt", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b.md", "sub/c.rst", "sub/d.py"]
    assert read(tmp_path / "b.md", tmp_path / "a.txt") == ["b.md", "a.txt"]


def test_compressed_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("schön\nwarm".encode()))
    lines = "\n".join(
        json.dumps({"text": text, "n": 1}) for text in ("one\u2028line", "", "half \ud800 pair")
    )
    (tmp_path / "b.jsonl").write_text(lines + "\n\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}'))
    (tmp_path / "d.json").write_text('{"text": "four"}\n')
    assert read(tmp_path) == ["schön\nwarm", "one\u2028line", "", "half \ufffd pair", "three"]
    assert read(tmp_path / "d.json") == ["four"]


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read(tmp_path / "a.txt") == ["one\r\ntwo"]


def test_characters_across_chunks_of_the_file_stay_whole(tmp_path: Path) -> None:
    text = "x" + "界🎉" * 400_000  # no chunk of the file begins with a character
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read(tmp_path / "a.txt") == [text]


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert "nothing.txt: no such file" in refused(tmp_path / "nothing.txt").message


def test_a_link_to_nothing_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, target in (("loop", "loop"), ("broken", "none")):
        (tmp_path / "folder" / name).symlink_to(target)
        with pytest.raises(InputError, match=f"folder/{name}: no such file or folder"):
            open_sources(DataConfig(source=pin_sources((f"folder/{name}",))))


def test_folder_without_text_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}: no text in this folder" in refused(tmp_path).message


def test_binary_file_is_named_with_its_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text\0more")
    assert refused(tmp_path).message == f"{tmp_path}/a.txt: not a text file: a zero byte at byte 4"


@pytest.mark.parametrize("offset", [0, 5, 2**20 - 1, 2**20, 2**20 + 7])
def test_text_that_is_not_utf8_is_named_with_its_offset(tmp_path: Path, offset: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * offset + b"\xfcber")
    assert f"a.txt: not a text file: not UTF-8 at byte {offset:,}" in refused(tmp_path).message


def test_text_that_ends_within_a_character_is_named_with_its_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("ab界".encode()[:-1])
    assert "not UTF-8 at byte 2" in refused(tmp_path).message


def test_broken_json_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "tw\n')
    assert "a.jsonl, line 2: broken JSON" in refused(tmp_path).message


@pytest.mark.parametrize("indent", [None, 2])
def test_json_arrays_are_read_item_by_item(tmp_path: Path, indent: int | None) -> None:
    texts = [f"{number} [brackets], commas \u2028" * number for number in range(500)]  # chunks of the file
    path = tmp_path / "a.json"
    path.write_text("\n " + json.dumps([{"n": 1, "text": text} for text in texts], indent=indent) + "\n")
    assert path.stat().st_size > 2**21
    assert read(path) == texts
    (tmp_path / "a.jsonl").write_text("[]")
    assert read(tmp_path / "a.jsonl") == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"text": "one"}, {"text": "tw', "item 2: broken JSON"),
        ('[{"text": "one"} {"text": "two"}]', "item 2: broken JSON (a comma or ] is missing)"),
        ('[{"text": "one"}', "item 2: broken JSON"),
        ('[{"text": "one"}]\n[{"text": "two"}]', "more text follows the array"),
        ('["one"]', "item 1: a JSON str, not an object"),
        ('[{"text": ["one"]}]', "item 1: field 'text' is not text (list)"),
        ('[{"body": "one"}]', "item 1: no field 'text'; it has 'body'"),
    ],
)
def test_broken_arrays_are_named_with_their_item(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert said in refused(tmp_path / "a.json").message


@pytest.mark.parametrize(("name", "between"), [("a.csv", ","), ("a.TSV", "\t"), ("a.csv.gz", ",")])
def test_tables_are_read_by_their_column(tmp_path: Path, name: str, between: str) -> None:
    rows = [["n", "text"], ["1", "one"], ["2", '"two, 2\ttabs\nand ""quotes"""'], ["3", ""]]
    content = "\r\n".join(between.join(row) for row in rows).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / name) == ["one", 'two, 2\ttabs\nand "quotes"', ""]
    assert "no field 'body'; it has 'n', 'text'" in refused(tmp_path / name, text_field="body").message


def test_a_table_that_would_lose_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\none, and two\n")
    assert "line 2: broken table (more columns than 1)" in refused(tmp_path / "a.csv").message
    (tmp_path / "a.csv").write_text('text\n"one\n')
    assert "broken table" in refused(tmp_path / "a.csv").message


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}]},
        {"conversations": []},
        {"instruction": "a", "input": "", "output": "b"},
        {"prompt": "a", "completion": "b"},
    ],
)
def test_conversations_are_told_from_plain_text(tmp_path: Path, row: dict[str, object]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert "`smolctl train chat --data …`" in refused(tmp_path).hint


def test_missing_text_field_names_line_and_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"content": "two", "id": 3}\n')
    message = refused(tmp_path).message
    assert "line 2: no field 'text'; it has 'content', 'id'" in message
    assert "line 1: no field 'content'" in refused(tmp_path, text_field="content").message
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n')
    assert "--set data.text_field=content" in refused(tmp_path).hint


@pytest.mark.parametrize("kind", PACKERS)
def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path, kind: str) -> None:
    pack = PACKERS[kind]
    text = "schön\nwarm" * 200_000  # many chunks
    (tmp_path / f"a.txt.{kind}").write_bytes(pack(text[:999_999].encode()) + pack(text[999_999:].encode()))
    (tmp_path / f"b.jsonl.{kind}").write_bytes(pack(b'{"text": "one"}\n{"text": "two"}'))
    (tmp_path / f"c.PY.{kind}").write_bytes(pack(b"code"))
    assert read(tmp_path) == [text, "one", "two", "code"]
    (tmp_path / f"a.txt.{kind}").write_bytes(pack(b"text\0"))
    assert "a zero byte at byte 4" in refused(tmp_path / f"a.txt.{kind}").message


@pytest.mark.parametrize("kind", PACKERS)
def test_damaged_compressed_files_are_named(tmp_path: Path, kind: str) -> None:
    path, whole = tmp_path / f"a.txt.{kind}", PACKERS[kind](b"some text " * 100_000)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    for content in (whole[:-9], whole[:3], b"not packed at all", flipped):
        path.write_bytes(content)
        assert f"a.txt.{kind}: damaged {NAMES.get(kind, kind)} file" in refused(tmp_path).message


def test_progress_of_a_compressed_file_counts_its_own_bytes(tmp_path: Path) -> None:
    for kind, pack in PACKERS.items():
        path = tmp_path / f"a.txt.{kind}"
        path.write_bytes(pack(random.Random(0).randbytes(300_000).hex().encode()))
        counts: list[int] = []
        documents = iter_documents([str(path)], on_read=counts.append)
        assert sum(len(piece) for document in documents for piece in document.chunks) == 600_000
        assert sum(counts) == path.stat().st_size


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["one", None, "three"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path) == ["one", "", "three"]
    assert "no column 'body'; it has 'text', 'n'" in refused(tmp_path, text_field="body").message
    assert "field 'n' is not text" in refused(tmp_path, text_field="n").message
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert "a.parquet: damaged Parquet" in refused(tmp_path).message


@pytest.mark.parametrize("name", ["shard.parquet", "notes.txt.zst", "org/data", "org/data:config"])
def test_missing_extra_says_how_to_install_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("pyarrow", "datasets", "compression", "zstandard"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    for file in ("shard.parquet", "notes.txt.zst"):
        Path(file).touch()
    with pytest.raises((InputError, MissingPackageError)) as caught:
        read(name)
    error = caught.value
    assert name in error.message
    assert install_command("data") in error.hint


def test_iter_texts_is_the_text_of_all_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n" * 9000)
    (tmp_path / "b.txt").write_text("two")
    texts = list(iter_texts(DataConfig(source=(str(tmp_path),))))
    assert len(texts) > 2
    assert "".join(texts) == "one\n" * 9000 + "two"
