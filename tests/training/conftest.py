"""What most tests of training begin with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from smolctl.training.prepare import Prepared
from tests.support.tiny_runs import prepare_tiny


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make(workshop: Path) -> Callable[..., Prepared]:
    """`make(**changes)`: a tiny run on the workshop's corpus, ready to be trained."""
    return functools.partial(prepare_tiny, workshop / "corpus")
