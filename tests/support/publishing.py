"""Runs to publish, and a loopback Hub to publish them to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from smolctl.data.tokenizer.tokenizer import train_tokenizer
from smolctl.hub.client import HubClient
from smolctl.publish.build import Built, build, open_model
from smolctl.publish.push import Pushed, PushOptions, choose_destination, plan_built, send
from smolctl.sources.huggingface.write import write_model
from tests.support.push_hub import TOKEN, PushHub
from tests.support.tiny_models import TEXTS, tiny_network
from tests.support.tiny_runs import prepare_tiny, run, write_corpus

LLAMA = {"model": {"position_embedding": "rope", "residual_scale": 1.0}}


def make_run(folder: Path, **changes: Any) -> Path:
    """A finished tiny run at folder/run."""
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus")
    return run(prepare_tiny(folder / "corpus", **changes), str(folder / "run"))


def build_folder(work: Path, **changes: Any) -> Built:
    """The repository of a model that was never trained, read from a Hugging Face folder."""
    source, target = work / "source", work / "out"
    source.mkdir()
    target.mkdir()
    network = tiny_network(vocab_size=320, eos_token_id=0, **changes)
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    tokenizer = train_tokenizer(iter(TEXTS), 320)
    write_model(source, network.config, state, "float32", tokenizer.files())
    return build(open_model(str(source)), target, ())


@contextmanager
def serving(
    monkeypatch: pytest.MonkeyPatch, folder: Path, xet: bool = False, **options: Any
) -> Iterator[PushHub]:
    """A Hub that the client is pointed at; its own waiting costs no time."""
    with PushHub(folder / "store", xet=xet, **options) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HOME", str(folder / "client"))
        monkeypatch.setenv("HF_XET_CACHE", str(folder / "client-xet"))
        for constant, value in {
            "HF_HUB_DISABLE_XET": not xet,
            "HF_HUB_CACHE": str(folder / "client"),
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, constant, value)
        clock = SimpleNamespace(sleep=lambda _s: None, time=time.time, monotonic=time.monotonic)
        monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
        yield hub


def publish(
    built: Built,
    notes: list[str] | None = None,
    wait: Callable[[float], None] | None = None,
    **options: Any,
) -> Pushed:
    """Plan and send what was built; nothing waits."""
    said = notes if notes is not None else []
    client = HubClient(said.append, wait or (lambda s: said.append(f"waits {s:g} s")))
    asked = PushOptions(**options)
    destination = choose_destination(asked, built.model, client)
    return send(plan_built(asked, destination, built, client), client)
