"""What thousands of requests leave behind: nothing."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from smolctl.data.tokenizer.chatml import CHATML
from smolctl.serving.guards import Limits
from tests.support.serving import PATIENCE_S, Served, serving
from tests.support.tiny_models import write_folder

CONTEXT = 300
CLIENTS = 12  # more than slots and waiting room together
WARM, MANY = 500, 3_000
KINDS = ("whole", "stream", "left", "schema", "bad schema", "garbage", "too long", "unknown")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    model = write_folder(tmp_path / "tiny", template=CHATML, context=CONTEXT)
    with serving(model, slots=4, limits=Limits(waiting=4)) as server:
        yield server


@dataclass(frozen=True)
class Held:
    """What the process holds."""

    threads: int  # without those that anyio keeps for a while, 40 at most
    files: int
    megabytes: float

    @staticmethod
    def now() -> Held:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        threads = sum("AnyIO" not in thread.name for thread in threading.enumerate())
        return Held(threads, len(list(Path("/proc/self/fd").iterdir())), megabytes)


def ask(served: Served, number: int) -> int:
    """One request of some kind; its status."""
    chance = random.Random(number)
    kind = chance.choice(KINDS)
    messages = [{"role": "user", "content": "the cat sat on the mat " * chance.choice([1, 5, 20])}]
    body = {"messages": messages, "max_tokens": chance.choice([1, 10, 100]), "n": chance.choice([1, 1, 3])}
    content, closes = json.dumps(body), kind == "left"
    if kind in ("stream", "left"):
        content = json.dumps({**body, "stream": True, "logprobs": chance.random() < 0.5})
    elif "schema" in kind:
        values = [f"{number}", "x"] if kind == "schema" else []
        form = {"type": "json_schema", "json_schema": {"schema": {"enum": values}}}
        content = json.dumps({**body, "response_format": form})
    elif kind == "garbage":
        content = chance.choice(["", "{", "[]", '{"messages": 5}', "x" * 10_000])
    elif kind == "too long":
        content = json.dumps({"messages": [{"role": "user", "content": "the cat " * CONTEXT}]})
    elif kind == "unknown":
        content = json.dumps({**body, "model": "gpt-4"})
    with served.client.stream("POST", "/v1/chat/completions", content=content) as answer:
        for _ in answer.iter_lines():
            if closes:
                break
        return answer.status_code


@pytest.mark.proof
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_three_thousand_rough_requests_leave_nothing_behind(served: Served) -> None:
    service = served.server.service
    with ThreadPoolExecutor(CLIENTS) as pool:

        def ask_many(numbers: range) -> Held:
            statuses = set(pool.map(lambda number: ask(served, number), numbers))
            assert {200, 400, 404} <= statuses <= {200, 400, 404, 503}
            deadline = time.monotonic() + PATIENCE_S
            while service.scheduler.active or service.scheduler.waiting or service._open or service._jobs:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return Held.now()

        before = ask_many(range(WARM))
        after = ask_many(range(WARM, WARM + MANY))
    assert after.threads <= before.threads
    assert after.files <= before.files + 2  # connections that the other side is about to close
    assert after.megabytes < before.megabytes + 16, (before, after)
