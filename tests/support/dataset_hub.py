"""Datasets on a loopback Hub, read by the real `datasets` and the real client."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.hub_server import HubRepository, HubServer


@contextmanager
def serving_datasets(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """A server that the clients find as if HF_ENDPOINT had named it when Python was started."""
    import datasets
    from huggingface_hub import constants

    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # asks another server
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def parquet(texts: Sequence[str | None], column: str = "text") -> bytes:
    """A Parquet file with a column of text and one of numbers, in row groups of twenty."""
    file = io.BytesIO()
    table = pyarrow.table({column: list(texts), "number": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, file, row_group_size=20)
    return file.getvalue()


def dataset(texts: Sequence[str | None], files: int = 4) -> HubRepository:
    """A dataset repository whose rows lie in several files, in order."""
    size = -(-len(texts) // files)
    return HubRepository(
        {
            f"train-{number:05d}-of-{files:05d}.parquet": parquet(texts[number * size :][:size])
            for number in range(files)
        }
    )
