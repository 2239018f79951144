"""A dataset on the Hub as documents, streamed, so that only what is needed is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from smolctl.data.text.documents import Document, text_of
from smolctl.errors import InputError
from smolctl.extras import install_command
from smolctl.hub.connection import api, read_timeout
from smolctl.hub.errors import READING_DATA, explained

_NAME = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@(\w[\w./-]*))?(?::([\w.-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class DatasetName:
    """`org/name[@revision][:config]`."""

    repository: str
    revision: str | None = None  # branch, tag or commit; None: the main branch
    config: str | None = None

    @staticmethod
    def parse(name: str) -> DatasetName | None:
        """Parse a name; None if it does not have this form."""
        match = _NAME.fullmatch(name)
        return DatasetName(*match.groups()) if match else None

    @staticmethod
    def recorded(name: str) -> DatasetName | None:
        """The dataset that a source in a run's config refers to; None for other sources.

        The meaning of a name is decided once, before the first step (`corpus.pin_sources`): from then on, a
        dataset includes its commit and a path is absolute, whatever files the working folder has later.
        """
        found = DatasetName.parse(name)
        return found if found and _COMMIT.fullmatch(found.revision or "") else None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}" + (f":{self.config}" if self.config else "")

    def pinned(self) -> DatasetName:
        """This name with its revision's current commit. A name with a commit needs no request.

        Raises:
            InputError: `datasets` is not installed.
            HubError: there is no such dataset, or the Hub does not respond.
        """
        if self.revision and _COMMIT.fullmatch(self.revision):
            return self
        _require_datasets(self)
        return replace(self, revision=_commit(self))


class DatasetReader:
    """Reads the rows of a split in order from a position on; each row is a document, and so is a file of
    plain text.

    Args:
        name: of the dataset; should have a commit, because other revisions may change.
        text_field: the column that holds the text.
        split: train, train_sft, ...
        state: position of an earlier reader of the same dataset, from its `state`; None: the beginning.
    """

    def __init__(
        self, name: DatasetName, text_field: str, split: str, state: dict[str, Any] | None = None
    ) -> None:
        self.name, self.text_field, self.split = name, text_field, split
        self._state = state
        self._rows: Any = None  # the iterable of `datasets`, after it was opened
        self._row = state["row"] if state else 0

    def documents(self) -> Iterator[Document]:
        """Stream the rows.

        Raises:
            InputError: `datasets` is not installed, or there is no such split or column.
            HubError: there is no such dataset, or the Hub did not provide it.
        """
        for where, row in self.rows():
            yield Document(where, iter([text_of(row, self.text_field, where)]))

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Stream the rows with all their fields and their origin. Errors as in `documents`."""
        _require_datasets(self.name)
        from datasets.exceptions import DatasetsError

        with _explained(self.name, DatasetsError):
            self._rows = self._open()
            for row in self._rows:
                self._row += 1
                yield f"{self.name}, row {self._row}", row

    def state(self) -> dict[str, Any] | None:
        """The position between two documents, as plain data; None at the beginning."""
        if self._rows is None:
            return self._state
        return {"row": self._row, "rows": self._rows.state_dict()}

    def _open(self) -> Any:
        """The iterable of `datasets`, set to start at the position."""
        # A request with a time limit first, because the library tries for half a minute to reach a server.
        commit = _commit(self.name)
        import datasets

        datasets.disable_progress_bars()
        source = self.name.repository, self.name.config
        builder = datasets.load_dataset_builder(*source, revision=commit)
        if hasattr(builder.config, "sample_by"):  # plain text, for which the library gives a row per line
            builder = datasets.load_dataset_builder(*source, revision=commit, sample_by="document")
        splits = builder.as_streaming_dataset()
        if self.split not in splits:
            raise InputError(
                f"{self.name}: no split {self.split!r}; it has {', '.join(map(repr, splits))}",
                "Name one with --set data.split=NAME.",
            )
        rows = splits[self.split]
        if self._state is not None:
            rows.load_state_dict(self._state["rows"])
        return rows


def _require_datasets(name: DatasetName) -> None:
    if find_spec("datasets") is None:
        raise InputError(
            f"{name}: no such file or folder, and reading it as a Hub dataset needs datasets",
            f"Check the path, or install datasets: {install_command('data')}",
        )


def _commit(name: DatasetName) -> str:
    """The current commit of a revision: one request, without retries."""
    with _explained(name):
        info = api().dataset_info(name.repository, revision=name.revision, timeout=read_timeout())
    return str(info.sha)


def _explained(name: DatasetName, *wrappers: type[Exception]) -> AbstractContextManager[None]:
    return explained(str(name), READING_DATA, path=f"datasets/{name.repository}", wrappers=wrappers)
