"""Text files, JSON lines and Parquet as documents, read piece by piece."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from smolctl.data.text.compression import ENDINGS, open_chunks
from smolctl.data.text.documents import Document, OnRead, cut, no_text
from smolctl.errors import InputError

_JSON_LINES = ("jsonl", "ndjson", "json")
# Found in folders. A .json file there may be anything, so it must be named to be read.
_PACKED = tuple(f"{kind}.{ending}" for kind in (".txt", ".jsonl") for ending in ENDINGS)
_IN_FOLDERS = (".txt", ".md", ".rst", ".py", ".jsonl", ".ndjson", *_PACKED, ".parquet")


def files_in(path: Path) -> tuple[Path, ...]:
    """A file itself, or the files of a folder that can be read, sorted by path, hidden ones left out.

    Raises:
        InputError: there is none.
    """
    if not path.is_dir():
        return (path,)
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.name.endswith(_IN_FOLDERS)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise InputError(
            f"{path}: no text in this folder (looked for {', '.join(_IN_FOLDERS)})",
            "Name the files themselves if they have other names.",
        )
    return tuple(found)


def is_file_name(path: Path) -> bool:
    """Whether a path can only be meant as a file of text, be it there or not."""
    return path.name.endswith((*_IN_FOLDERS, ".json"))


def read_file(path: Path, text_field: str, on_read: OnRead) -> Iterator[Document]:
    """The documents of one file: a text file is one, a line of JSON and a row of Parquet are one each.

    Args:
        path: its name tells the format; an unknown one is read as text.
        text_field: the column that holds the text.
        on_read: told the bytes of the file as they are read.

    Raises:
        InputError: the file is missing, binary, damaged, or has no such column.
    """
    suffixes = [suffix.lstrip(".").lower() for suffix in path.suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix not in ENDINGS), "")
    if kind == "parquet":
        yield from _read_parquet(path, text_field, on_read)
        return
    chunks = _read_text(path, on_read)
    if kind in _JSON_LINES:
        yield from _read_json_lines(path, chunks, text_field)
    else:
        yield Document(str(path), cut(chunks))


def _read_text(path: Path, on_read: OnRead) -> Iterator[str]:
    """The text of a file in chunks.

    Raises:
        InputError: the file is damaged, or holds bytes that are not text: with their offset.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    before = offset = 0
    with open_chunks(path) as (chunks, position):
        for chunk in chain(chunks, [b""]):  # the empty one tells the decoder that this is the end
            pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut in two
            zero = chunk.find(b"\0")
            if zero >= 0:
                raise _binary(path, offset + zero, "a zero byte")
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _binary(path, offset - pending + error.start, "not UTF-8") from None
            if offset == 0:
                text = text.removeprefix("\ufeff")  # a byte order mark is no text
            if text:
                yield text
            offset += len(chunk)
            reached = position()
            on_read(reached - before)
            before = reached


def _binary(path: Path, offset: int, reason: str) -> InputError:
    return InputError(
        f"{path}: no text file: {reason} at byte {offset:,}",
        "Give UTF-8 text (`iconv -t UTF-8` converts others).",
    )


def _read_json_lines(path: Path, chunks: Iterator[str], text_field: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(chunks), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield Document(where, cut([_text_of(_record(line, where), text_field, where)]))


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    """Lines that end in a newline alone: JSON text may hold every other kind of line end."""
    begun: list[str] = []  # parts of a line that is not yet complete
    for chunk in chunks:
        first, *rest = chunk.split("\n")
        begun.append(first)
        for line in rest:
            yield "".join(begun)
            begun = [line]
    yield "".join(begun)


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: broken JSON ({error})", "Every line must be one JSON object.") from None
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: a JSON {type(record).__name__}, not an object",
            "Every line must be one JSON object; `jq -c '.[]'` turns an array into lines.",
        )
    return record


def _text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    text = record.get(text_field)
    if not isinstance(text, str):
        reason = f"no field {text_field!r}" if text is None else f"field {text_field!r} is no text"
        raise no_text(where, reason, record)
    # Escapes in JSON can spell half a character, which no tokenizer takes.
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_parquet(path: Path, text_field: str, on_read: OnRead) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow", "pip install 'smolctl[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise no_text(str(path), f"no column {text_field!r}", columns)
            share = path.stat().st_size // max(1, table.metadata.num_rows)
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    where = f"{path}, row {row}"
                    yield Document(where, cut([_text_of({text_field: text or ""}, text_field, where)]))
                on_read(share * batch.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: damaged Parquet file ({reason})", "Fetch or write the file again."
        ) from None
