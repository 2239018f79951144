"""The compiled engine's builds, and an engine whose calls can be watched from another thread."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from smolctl.generation.native_engine import NativeEngine
from smolctl.model.network import Transformer
from smolctl.native.library import OVERRIDE, Library, load_library
from smolctl.sources.arrays import as_array
from tests.support.emulated import ARM, emulated_library

# For tests that run on emulated processors too.
EMULATED = [pytest.param(name, marks=pytest.mark.proof) for name in ARM]


def library(build: str) -> Library:
    """A build of this installation or of `ARM`, or a skip where the machine does not run it."""
    if build in ARM:
        return emulated_library(build)
    os.environ[OVERRIDE] = build
    try:
        found = load_library.__wrapped__()
    finally:
        del os.environ[OVERRIDE]
    if isinstance(found, str):
        assert build != "baseline", f"the compiled engine is part of an installation: {found}"
        pytest.skip(found)
    return found


class Watched:
    """The functions of a build, with a count of the entries into the compiled forward pass."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions
        self._changed = threading.Condition()
        self.entries = 0
        self.on_entry: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    def smolctl_forward(self, *arguments: object) -> int:
        with self._changed:
            self.entries += 1
            self._changed.notify_all()
        self.on_entry()
        status: int = self._functions.smolctl_forward(*arguments)
        return status

    def begin(self, pool: ThreadPoolExecutor, work: Callable[..., Any], *arguments: object) -> Future[Any]:
        """Start work in a thread, and return once a thread has entered the forward pass."""
        seen = self.entries
        started = pool.submit(work, *arguments)
        with self._changed:
            self._changed.wait_for(lambda: self.entries > seen)
        return started


def watched_engine(network: Transformer, build: str = "baseline") -> tuple[NativeEngine, Watched]:
    """An engine with a network's weights in float32, on two threads."""
    found = library(build)
    watched = Watched(found.functions)
    weights = {name: as_array(tensor) for name, tensor in network.state_dict().items()}
    watched_library = Library(found.build, watched)  # type: ignore[arg-type]
    return NativeEngine(watched_library, network.config, weights, threads=2), watched
