"""The sources that `--data` names, as streams of documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolctl.config.data import DataConfig
from smolctl.data.text import python_library as library
from smolctl.data.text.conversations import Conversation, RowError, read_conversation
from smolctl.data.text.documents import Document, OnRead, cut
from smolctl.data.text.files import describe_files, find_files, is_file_name, read_file, read_rows
from smolctl.data.text.hub import DatasetName, DatasetReader
from smolctl.data.text.library_questions import library_questions
from smolctl.durable import named_path
from smolctl.errors import RENAME, InputError
from smolctl.escaping import is_utf8
from smolctl.outside import path_meant

# At most this much of a Hub dataset is downloaded to train a tokenizer.
_HUB_SAMPLE = 64 * 1024 * 1024  # characters


@dataclass(frozen=True)
class Source:
    """One item of `--data`; its text has not been read yet.

    Attributes:
        name: as the user gave it.
        size: bytes that will be read, or None if not known (a Hub dataset).
        identity: distinguishes it from other sources without reading it: sizes, modification times.
        read: yields its documents; takes a function that is called with the bytes read.
        rows: likewise, yields its rows with all their fields and their origin, or the error of a row.
        dataset: its name if it is a Hub dataset.
        read_as: how the name was interpreted, and which files are read and skipped; empty if that is obvious.
    """

    name: str
    size: int | None
    identity: list[Any]
    read: Callable[[OnRead], Iterator[Document]]
    rows: Callable[[OnRead], Iterator[tuple[str, Mapping[str, Any] | str]]]
    dataset: DatasetName | None = None
    read_as: str = ""


class MissingSourceError(InputError):
    """A source does not exist."""


class SequenceLengthError(InputError):
    """A text is too short for a sequence of `data.sequence_length` tokens, which the caller may not have
    set.
    """


def pin_sources(names: Sequence[str]) -> tuple[str, ...]:
    """Replace names by names that mean the same later and elsewhere.

    Paths become absolute. A Hub dataset's revision is replaced by its current commit, so a run that stores
    these names continues with the same rows even after the dataset has changed.

    Raises:
        InputError: `datasets` is not installed, or a path is not UTF-8.
        HubError: a dataset is not available.
    """
    return tuple(map(_pinned, names))


def shown_name(name: str) -> str:
    """A source's name for people: relative if it is in the working folder."""
    path, here = Path(name), Path.cwd()
    if not path.is_absolute() or not path.is_relative_to(here):
        return name
    relative = str(path.relative_to(here))
    return f"./{relative}" if relative == library.NAME else relative


def _pinned(name: str) -> str:
    path = named_path(name)
    if name != library.NAME and path.exists():
        if not is_utf8(whole := str(path.absolute())):
            raise InputError(f"{whole}: its name is not UTF-8", RENAME)
        return whole
    dataset = _dataset(name)
    return str(dataset.pinned()) if dataset else name


def open_sources(data: DataConfig) -> list[Source]:
    """Open what each name refers to: the built-in `python`, a file, a folder, or a Hub dataset.

    Raises:
        MissingSourceError: there is no such file.
        InputError: a folder without text, or a split for a source without splits.
    """
    if not data.source:
        raise InputError("data.source is empty", "Name files, folders, a Hub dataset, or 'python'.")
    sources = list(map(_open_source, data.source, data.text_fields, data.splits))
    if isinstance(data.split, str) and data.split != "train" and not any(one.dataset for one in sources):
        raise InputError(f"data.split={data.split}: only Hub datasets have splits", "Leave data.split out.")
    return sources


def _open_source(name: str, text_field: str, split: str) -> Source:
    path = named_path(name)
    if name == library.NAME:
        read_as = f"{name}: the built-in corpus"
        if path.exists():
            read_as += f", not the file or folder of that name; write ./{name} for that"
        return Source(
            name,
            library.library_size(),
            library.library_identity(),
            library.library_documents,
            library_questions,
            read_as=f"{read_as}.",
        )
    if path.exists():
        return _local_source(name, path, text_field)
    if dataset := _dataset(name):
        return Source(
            name,
            None,
            [str(dataset)],
            lambda _: DatasetReader(dataset, text_field, split).documents(),
            lambda _: DatasetReader(dataset, text_field, split).rows(),
            dataset,
            f"{name}: split {split} of the Hub dataset.",
        )
    raise MissingSourceError(
        f"{name}: no such file or folder",
        f"{path_meant(path)}Name files, folders, a Hub dataset (org/name[@revision][:config]), or 'python'.",
    )


def _dataset(name: str) -> DatasetName | None:
    """A name as that of a Hub dataset, unless it refers to something on this machine."""
    path = named_path(name)
    is_here = path.exists() or path.is_symlink()  # or a link to nothing
    return None if is_here or is_file_name(path) else DatasetName.parse(name)


def _local_source(name: str, path: Path, text_field: str) -> Source:
    found = find_files(path)
    files = found.files
    stats = [path.stat() for path in files]
    identity = [
        [str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in zip(files, stats, strict=True)
    ]

    def read(on_read: OnRead) -> Iterator[Document]:
        for path in files:
            yield from read_file(path, text_field, on_read)

    def rows(on_read: OnRead) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
        for path in files:
            yield from read_rows(path, on_read)

    size = sum(stat.st_size for stat in stats)
    return Source(name, size, identity, read, rows, read_as=describe_files(shown_name(name), found))


def iter_texts(data: DataConfig) -> Iterator[str]:
    """The pieces of all documents, for training a tokenizer; of a Hub dataset only the beginning."""
    for source in open_sources(data):
        seen = 0
        texts = _messages(source, data.shape) if data.is_chat else source.read(lambda _: None)
        for document in texts:
            for piece in cut(document.chunks):
                yield piece
                seen += len(piece)
            if source.size is None and seen >= _HUB_SAMPLE:
                break


def readable_conversations(source: Source, shape: str) -> Iterator[Conversation]:
    """The conversations in the rows of a source; rows without a conversation are skipped."""
    for where, row in source.rows(lambda _: None):
        with suppress(RowError):
            if not isinstance(row, str):
                yield read_conversation(row, shape, where)


def _messages(source: Source, shape: str) -> Iterator[Document]:
    """The texts of the conversations of a source."""
    for found in readable_conversations(source, shape):
        yield Document(found.where, iter([message["content"] for message in found.messages]))
