"""The models of these tests: one with a chat template, one without."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.support.interruption import InterruptedAt, interrupted_at
from tests.support.tiny_models import write_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "other", seed=1, template=None)


@pytest.fixture(name="interrupted_at")
def _interrupted_at(monkeypatch: pytest.MonkeyPatch) -> InterruptedAt:
    return partial(interrupted_at, monkeypatch=monkeypatch)
