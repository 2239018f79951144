"""Text files, tables, JSON and Parquet as documents, read in pieces."""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from smolctl.data.text.compression import ENDINGS, open_chunks, require_same
from smolctl.data.text.documents import Document, OnRead, no_text, text_of
from smolctl.errors import InputError
from smolctl.extras import missing_package
from smolctl.outside import parse_json

_JSON = ("jsonl", "ndjson", "json")
_TABLES = {"csv": ",", "tsv": "\t"}  # with the separators of their columns
_PROSE = "txt text md markdown rst adoc org tex"
_CODE = (
    "py pyi js mjs cjs ts jsx tsx c h cc cpp cxx hpp cu java kt scala go rs rb php pl pm lua swift cs fs hs "
    "ml ex exs erl clj jl r f90 zig nim dart sh bash zsh sql"
)
# Read in folders. A .json or .csv file may be anything, so it must be named explicitly.
_IN_FOLDERS = frozenset([*_PROSE.split(), *_CODE.split(), "jsonl", "ndjson", "parquet"])
_READABLE = _IN_FOLDERS | {"json", *_TABLES}
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class FoundFiles:
    """The files under a path.

    Attributes:
        files: those that are read, sorted by path.
        skipped: how many are skipped, by reason.
    """

    files: tuple[Path, ...]
    skipped: Mapping[str, int]


def find_files(path: Path) -> FoundFiles:
    """A file itself, or the readable files of a folder and its subfolders.

    Links are followed, and their targets are read only once. A hidden folder counts as one file.

    Raises:
        InputError: the path is neither a file nor a folder, or the folder has no readable files.
    """
    if not (path.is_file() or path.is_dir()) or _is_made_up(path):
        raise InputError(
            f"{path}: neither a file nor a folder", "Text is read more than once: save it in a file first."
        )
    if path.is_file():
        return FoundFiles((path,), {})
    skipped: Counter[str] = Counter()
    files = tuple(_walk(path, {_identity(path)}, skipped))
    if not files:
        raise InputError(
            f"{path}: no text in this folder ({f'skipped {_counts(skipped)}' if skipped else 'it is empty'})",
            "Folders are searched for text, code, .jsonl and .parquet; name other files directly.",
        )
    return FoundFiles(files, skipped)


def _walk(folder: Path, seen: set[object], skipped: Counter[str]) -> Iterator[Path]:
    """Yield files to read, in order; skipped files are counted by reason."""
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        skipped["unreadable"] += 1
        return
    for path in inside:
        try:
            reason = _reason_to_skip(path) or ("found twice" if _identity(path) in seen else "")
        except OSError:
            reason = "unreadable"
        if reason:
            skipped[reason] += 1
            continue
        seen.add(_identity(path))
        if path.is_dir():
            yield from _walk(path, seen, skipped)
        else:
            yield path


def _identity(path: Path) -> object:
    """Equal for two paths to the same file or folder; some file systems do not support this."""
    stat = path.stat()
    return (stat.st_dev, stat.st_ino) if stat.st_ino else path.resolve()


def _is_made_up(path: Path) -> bool:
    """Whether the kernel makes up the content of a file or folder when it is read, as in /proc. Reading such
    a file may never end, and such a folder leads to the whole disk.
    """
    return path.stat().st_size == 0 and os.statvfs(path).f_blocks == 0


def _reason_to_skip(path: Path) -> str:
    """The reason for skipping a file or folder found in a folder; empty to read it."""
    if path.name.startswith("."):
        return "hidden"
    if not path.exists():
        return "broken link"
    if not (path.is_file() or path.is_dir()) or _is_made_up(path):
        return "not a regular file"
    if path.is_dir():
        return ""
    ending = path.suffix.lower()
    if (kind := kind_of(path)) not in _IN_FOLDERS or (kind == "parquet" and ending != ".parquet"):
        return ending or "without a file extension"
    return "" if os.access(path, os.R_OK) else "unreadable"


def describe_files(name: str, found: FoundFiles) -> str:
    """One sentence on which files of a source are read and skipped; empty if that is obvious."""
    if found.skipped:
        return f"{name}: read {_files(len(found.files))}, skipped {_counts(found.skipped)}."
    if Path(name).is_dir():
        return f"{name}: read {_files(len(found.files))}."
    return "" if kind_of(found.files[0]) in _READABLE else f"{name}: read as plain text."


def _files(count: int) -> str:
    return f"{count:,} file{'' if count == 1 else 's'}"


def _counts(skipped: Mapping[str, int]) -> str:
    """Formats counts as "4: .html 2, unreadable 1, hidden 1"."""
    most = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return f"{sum(skipped.values()):,}: " + ", ".join(f"{reason} {count:,}" for reason, count in most)


def kind_of(path: Path) -> str:
    """The suffix that determines a file's format: `jsonl` for `a.JSONL.gz`."""
    suffixes = [suffix.lstrip(".").lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in ENDINGS), "")


def is_file_name(path: Path) -> bool:
    """Whether a path can only mean a text file, whether it exists or not."""
    return kind_of(path) in _READABLE


def read_file(path: Path, text_field: str, on_read: OnRead) -> Iterator[Document]:
    """The documents of one file: a text file is one document; in other formats, each JSON object or table row
    is one.

    A row whose text is null or empty gives an empty document.

    Args:
        path: its suffix determines the format; an unknown one is read as text.
        text_field: the column that holds the text.
        on_read: called with the number of bytes read.

    Raises:
        InputError: the file is missing, binary or damaged, or has no such column.
    """
    kind = kind_of(path)
    if kind == "parquet":
        for where, row in _parquet_rows(path, text_field, on_read):
            yield Document(where, iter([text_of(row, text_field, where)]))
        return
    chunks = _read_text(path, on_read)
    if kind in _JSON:
        rows = _json_rows(path, chunks)
    elif kind in _TABLES:
        rows = _table_rows(path, chunks, _TABLES[kind])
    else:
        yield Document(str(path), chunks)
        return
    for where, row in rows:
        yield Document(where, iter([text_of(row, text_field, where)]))


def read_rows(path: Path, on_read: OnRead) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """The rows of one file with all their fields and their origin; for a broken line, the reason.

    Arguments and errors as in `read_file`; a text file has no rows.
    """
    kind = kind_of(path)
    if kind == "parquet":
        yield from _parquet_rows(path, None, on_read)
        return
    if kind not in (*_JSON, *_TABLES):
        raise InputError(
            f"{path}: conversations are not read from plain text",
            "Write JSON Lines, JSON, CSV or Parquet; or train on the text with another preset than chat.",
        )
    chunks = _read_text(path, on_read)
    first = next(chunks, "")
    chunks = chain([first], chunks)
    if kind in _TABLES:
        yield from _table_rows(path, chunks, _TABLES[kind])
    elif first.lstrip().startswith("["):
        yield from _array_rows(path, chunks)
    else:
        for number, line in enumerate(_lines(chunks), start=1):
            if line.strip():
                yield f"{path}, line {number}", _object_in(line)


def _object_in(line: str) -> Mapping[str, Any] | str:
    try:
        record = parse_json(line)
    except ValueError as error:
        return f"cannot be read: {error}"
    return record if isinstance(record, dict) else f"is a JSON {type(record).__name__}, not an object"


def _read_text(path: Path, on_read: OnRead) -> Iterator[str]:
    """The text of a file in chunks.

    Raises:
        InputError: the file is damaged, or contains bytes that are not text; with their offset.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    before = offset = 0
    with open_chunks(path) as (chunks, position):
        for chunk in chain(chunks, [b""]):  # the empty chunk ends the decoder's input
            pending = len(decoder.getstate()[0])  # bytes of a character cut by the end of the last chunk
            zero = chunk.find(b"\0")
            if zero >= 0:
                hint = "Convert UTF-16 with `iconv -f UTF-16 -t UTF-8`; `tr -d '\\0'` drops zero bytes."
                raise _binary(path, offset + zero, "a zero byte", hint)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                hint = "Convert it, as with `iconv -f LATIN1 -t UTF-8`; `iconv -c -t UTF-8` drops such bytes."
                raise _binary(path, offset - pending + error.start, "not UTF-8", hint) from None
            if offset == 0:
                text = text.removeprefix("\ufeff")  # a byte order mark is not part of the text
            if text:
                yield text
            offset += len(chunk)
            reached = position()
            on_read(reached - before)
            before = reached


def _binary(path: Path, offset: int, reason: str, hint: str) -> InputError:
    return InputError(f"{path}: not a text file: {reason} at byte {offset:,}", hint)


def _json_rows(path: Path, chunks: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, one per line or in one array, with their origin."""
    first = next(chunks, "")
    chunks = chain([first], chunks)
    if first.lstrip().startswith("["):
        yield from _array_rows(path, chunks)
        return
    for number, line in enumerate(_lines(chunks), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)  # noqa: TID251 - nobody computes with a row's numbers
            except (ValueError, RecursionError) as error:  # ValueError: including a number of 5,000 digits
                hint = "Every line must be one JSON object, or the whole file one array of objects."
                raise InputError(f"{where}: broken JSON ({error})", hint) from None
            yield where, _object(record, where)


def _array_rows(path: Path, chunks: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The items of an array, with at most one chunk and one item in memory."""
    decoder, number = json.JSONDecoder(), 1
    text = next(chunks)
    at = text.index("[") + 1
    while True:
        where = f"{path}, item {number}"
        try:
            begin = _end_of_space(text, at)
            if text.startswith("]", begin):
                break
            if number > 1:
                if not text.startswith(",", begin):
                    raise json.JSONDecodeError("a comma or ] is missing", text, begin)
                begin = _end_of_space(text, begin + 1)
            record, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError) and (more := next(chunks, "")):
                text, at = text[at:] + more, 0
                continue
            raise InputError(
                f"{where}: broken JSON ({getattr(error, 'msg', error)})",
                "Correct the file or write it again.",
            ) from None
        yield where, _object(record, where)
        at, number = end, number + 1
    if any(rest.strip() for rest in chain([text[begin + 1 :]], chunks)):
        raise InputError(f"{path}: more text follows the array", "Write one array, or one object per line.")


def _end_of_space(text: str, start: int) -> int:
    space = _JSON_SPACE.match(text, start)
    return space.end() if space else start


def _table_rows(path: Path, chunks: Iterator[str], separator: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table whose first line has the column names, and where they end."""
    csv.field_size_limit(2**31 - 1)  # a field may be a whole book
    reader = csv.DictReader((f"{line}\n" for line in _lines(chunks)), delimiter=separator, strict=True)
    try:
        for row in reader:
            if None in row:
                raise csv.Error(f"more columns than {len(reader.fieldnames or ())}")
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num}: broken table ({error})",
            "The first line must name the columns; a text that holds separators or line ends needs quotes.",
        ) from None


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    """Lines that end only in a newline: JSON text may contain all other kinds of line ends."""
    begun: list[str] = []  # parts of an incomplete line
    for chunk in chunks:
        first, *rest = chunk.split("\n")
        begun.append(first)
        for line in rest:
            yield "".join(begun)
            begun = [line]
    yield "".join(begun)


def _object(record: object, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: a JSON {type(record).__name__}, not an object",
            'Write each text as an object, such as {"text": "..."}.',
        )
    return record


def _parquet_rows(path: Path, column: str | None, on_read: OnRead) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows with one column, or with all columns if none is named."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_package("pyarrow", "data", str(path)) from None
    try:
        before = path.stat()
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if column is not None and column not in columns:
                raise no_text(str(path), f"no column {column!r}", columns)
            share = before.st_size // max(1, table.metadata.num_rows)
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=None if column is None else [column]):
                for fields in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", fields
                on_read(share * batch.num_rows)
            require_same(path, before, path.stat())
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: damaged Parquet file ({reason})", "Fetch or write the file again."
        ) from None
