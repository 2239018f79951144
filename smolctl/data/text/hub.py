"""A dataset on the Hub as documents, streamed: what is not asked for is not downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from smolctl.data.text.documents import Document, cut, no_text
from smolctl.errors import InputError
from smolctl.hub.connection import api, question_seconds
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
        """The parts of a name, or None when it does not read like one."""
        match = _NAME.fullmatch(name)
        return DatasetName(*match.groups()) if match else None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}" + (f":{self.config}" if self.config else "")

    def pinned(self) -> DatasetName:
        """This name with the commit that its revision stands for now. A commit is not asked about.

        Raises:
            InputError: `datasets` is not installed.
            HubError: there is no such dataset, or the Hub does not answer.
        """
        if self.revision and _COMMIT.fullmatch(self.revision):
            return self
        _require_datasets(self)
        return replace(self, revision=_commit(self))


class DatasetReader:
    """The rows of split `train` in their order, from a place on; each text that is not empty a document.

    Args:
        name: of the dataset; best with a commit, as other revisions may move.
        text_field: the column that holds the text.
        state: where an earlier reader of the same dataset was, from its `state`; None: the beginning.
    """

    def __init__(self, name: DatasetName, text_field: str, state: dict[str, Any] | None = None) -> None:
        self.name, self.text_field = name, text_field
        self._state = state
        self._rows: Any = None  # the iterable of `datasets`, once it is opened
        self._row = state["row"] if state else 0

    def documents(self) -> Iterator[Document]:
        """Stream the rows.

        Raises:
            InputError: `datasets` is not installed, or there is no such column.
            HubError: there is no such dataset, or the Hub did not give it.
        """
        _require_datasets(self.name)
        from datasets.exceptions import DatasetsError

        with _explained(self.name, DatasetsError):
            self._rows = self._open()
            for row in self._rows:
                self._row += 1
                if text := self._text(row):
                    yield Document(f"{self.name}, row {self._row}", cut([text]))

    def state(self) -> dict[str, Any] | None:
        """Where it is, between two documents, as plain data; None at the beginning."""
        if self._rows is None:
            return self._state
        return {"row": self._row, "rows": self._rows.state_dict()}

    def _open(self) -> Any:
        """The iterable of `datasets`, set to begin at our place."""
        # One question with a time limit: the library itself tries for half a minute to reach a dead server.
        commit = _commit(self.name)
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.load_dataset(
            self.name.repository, self.name.config, split="train", revision=commit, streaming=True
        )
        if self._state is not None:
            rows.load_state_dict(self._state["rows"])
        return rows

    def _text(self, row: dict[str, Any]) -> str:
        text = row.get(self.text_field, 0)
        if text is not None and not isinstance(text, str):
            raise no_text(f"{self.name}, row {self._row}", f"no text in column {self.text_field!r}", row)
        return text or ""


def _require_datasets(name: DatasetName) -> None:
    if find_spec("datasets") is None:
        raise InputError(
            f"{name}: no such file or folder, and reading it as a Hub dataset needs datasets",
            "Check the path, or pip install 'smolctl[data]'.",
        )


def _commit(name: DatasetName) -> str:
    """The commit that a revision stands for now: one request, without retries."""
    with _explained(name):
        info = api().dataset_info(name.repository, revision=name.revision, timeout=question_seconds())
    return str(info.sha)


def _explained(name: DatasetName, *wrappers: type[Exception]) -> AbstractContextManager[None]:
    return explained(str(name), READING_DATA, path=f"datasets/{name.repository}", wrappers=wrappers)
