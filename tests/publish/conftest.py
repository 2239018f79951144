"""What is trained and built once a session, and a Hub that every test has for itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from smolctl.publish.build import Built, build, open_model
from smolctl.publish.gradio_space import add_space
from tests.support.publishing import make_run, serving
from tests.support.push_hub import PushHub
from tests.support.tiny_models import TEMPLATE


@pytest.fixture(scope="session")
def learned_run(workshop: Path) -> Path:
    """A run with learned positions, which transformers reads with code of ours. Only to be read."""
    return workshop / "runs" / "learned"


@pytest.fixture(scope="session")
def llama_run(workshop: Path) -> Path:
    """A run that is a Llama. Only to be read."""
    return workshop / "runs" / "llama"


@pytest.fixture(scope="session")
def learned(learned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The repository of `learned_run`."""
    return build(open_model(str(learned_run)), tmp_path_factory.mktemp("built"), ())


@pytest.fixture(scope="session")
def llama(llama_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The repository of `llama_run`."""
    return build(open_model(str(llama_run)), tmp_path_factory.mktemp("built"), ())


@pytest.fixture(scope="session")
def with_ggufs(llama_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The repository of `llama_run` with two GGUF files."""
    return build(open_model(str(llama_run)), tmp_path_factory.mktemp("built"), ("q8_0", "f16"))


@pytest.fixture(scope="session")
def with_space(learned: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The repository of `learned_run` with a Space whose model continues text."""
    folder = tmp_path_factory.mktemp("space")
    add_space(learned, folder)
    return replace(learned, space=folder)


@pytest.fixture(scope="session")
def chat_space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Space's folder of a model with a chat template."""
    run = make_run(tmp_path_factory.mktemp("chat-run"), model={"max_position_embeddings": 128})
    folder = tmp_path_factory.mktemp("chat-model")
    build(open_model(str(run)), folder, ())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    built = build(open_model(str(folder)), tmp_path_factory.mktemp("built"), ())
    space = tmp_path_factory.mktemp("chat-space")
    add_space(built, space)
    return space


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PushHub]:
    """A Hub to push to."""
    with serving(monkeypatch, tmp_path / "hub") as server:
        yield server
