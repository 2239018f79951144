"""Ctrl-C at a moment that a test chooses."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from smolctl.generation.native_engine import NativeEngine

InterruptedAt = Callable[[int], AbstractContextManager[None]]  # the fixture `interrupted_at`


@contextmanager
def interrupted_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C before a call of the engine, by number from 1."""
    count, forward = itertools.count(1), NativeEngine.forward

    def stopped(*arguments: Any, **options: Any) -> Any:
        if next(count) == call:
            signal.raise_signal(signal.SIGINT)
        return forward(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(NativeEngine, "forward", stopped)
        yield
