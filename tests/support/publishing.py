"""Runs to publish, and a loopback Hub to publish them to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from smolctl.hub.client import HubClient
from smolctl.publish.push import Pushed, PushOptions, push
from tests.support.push_hub import TOKEN, PushHub
from tests.support.tiny_runs import prepare_tiny, run, write_corpus

LLAMA = {"model": {"position_embedding": "rope", "residual_scale": 1.0}}


def make_run(folder: Path, **changes: Any) -> Path:
    """A finished tiny run at folder/run."""
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus")
    return run(prepare_tiny(folder / "corpus", **changes), str(folder / "run"))


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


def publish(run: Path | str, notes: list[str] | None = None, **options: Any) -> Pushed:
    """`smolctl push` without its command line; nothing waits."""
    said = notes if notes is not None else []
    client = HubClient(said.append, wait=lambda s: said.append(f"waits {s:g} s"))
    return push(PushOptions(model=str(run), **options), said.append, lambda _plan: None, client)
