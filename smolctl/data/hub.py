"""A dataset on the Hub as documents, streamed: what is not asked for is not downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator

from smolctl.data.documents import Document, cut
from smolctl.errors import HubError, InputError

_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def is_dataset_name(name: str) -> bool:
    """Whether a source reads as `org/name[:config]`."""
    return _NAME.fullmatch(name) is not None and not name.startswith((".", "/"))


def read_dataset(name: str, text_field: str) -> Iterator[Document]:
    """The rows of split `train`, one document each.

    Args:
        name: `org/name` or `org/name:config`.
        text_field: the column that holds the text.

    Raises:
        InputError: `datasets` is not installed, or there is no such column.
        HubError: there is no such dataset, or the Hub did not give it.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{name}: no such file or folder, and reading it as a Hub dataset needs datasets",
            "Check the path, or pip install 'smolctl[data]'.",
        ) from None
    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split="train", streaming=True)
        for number, row in enumerate(rows):
            if not isinstance(row.get(text_field), str):
                columns = ", ".join(map(repr, row))
                raise InputError(
                    f"{name}, row {number}: no text in column {text_field!r}; it has {columns}",
                    "Set data.text_field to the column that holds the text.",
                )
            yield Document(f"{name}, row {number}", cut([row[text_field]]))
    except (OSError, RuntimeError, ValueError) as error:
        # What datasets and huggingface_hub raise for refused, missing, gated and unreachable.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise HubError(
            f"{name}: the dataset cannot be read ({reason})",
            "Check the name and the network; `--data python` needs neither.",
        ) from None
