"""Servers with OpenAI's API under load: total tokens per second, how long clients wait, and memory.

    python benchmarks/serve.py FILE.gguf
    python benchmarks/serve.py FILE.gguf --space
    python benchmarks/serve.py FILE.gguf --peer-command "llama-server -m {model} --port {port} -np 8"
    python benchmarks/serve.py FILE.gguf --url other=http://127.0.0.1:8002

The first server is `smolctl serve`; --space adds the Gradio Space of the same model, --peer-command and --url
add other servers with OpenAI's API. They take turns in every round, with the same requests. Each client sends
one request after the other, with prompts and answers of mixed lengths; half of the prompts share a prefix.
With --rough, some clients drop the connection, and some send invalid requests. Prints a Markdown table, in
less than three minutes for two servers on two idle cores, and fails if `smolctl serve` used more memory than
the file, the KV cache of its slots and 150 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.escaping import json_text
from smolctl.programs import running_program
from smolctl.publish.app import FACTS, MODEL
from smolctl.publish.gradio_space import APP, copy_package
from smolctl.sources import open_source

BEGINNING = "You are a patient gardener who answers in short sentences and never names a price. " * 6
WORDS = ("the", "old", "garden", "behind", "a", "house", "near", "the", "river", "where", "apples", "grow")
PATIENCE_S = 600
HEAD = (
    "clients | server | tok/s in all | first token, ms (p50 / p95 / p99) | between pieces, ms | "
    "MB at first, most | files at first, at last | failed"
)
SLOTS, CONTEXT = 8, 2048
OVERHEAD_MB = 150  # for the interpreter, the buffers of the engine and everything else
GARBAGE = (b"", b"{", b"[]", b'{"messages": 5}', b'{"messages": [], "n": 1e9}', b"\xff" * 1_000)


@dataclass(frozen=True)
class Server:
    """A server to measure."""

    name: str
    url: str
    process: subprocess.Popen[bytes] | None = None  # None: it was there before
    is_space: bool = False

    def held(self) -> tuple[float, float]:
        """Resident megabytes and open files of the process; NaN where it is not known."""
        if self.process is None:
            return float("nan"), float("nan")
        place = Path(f"/proc/{self.process.pid}")
        status = (place / "status").read_text(encoding="ascii")
        return int(status.partition("VmRSS:")[2].split()[0]) / 1000, len(list((place / "fd").iterdir()))

    def check_memory(self, model: Path) -> str:
        """What smolctl's server has held at most, in words; a system error where that is too much."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        most = int(status.partition("VmHWM:")[2].split()[0]) / 1000
        metrics = httpx.get(f"{self.url}/metrics").text
        cache = float(metrics.partition("\nsmolctl_cache_bytes ")[2].split()[0]) / 1e6
        weights = model.stat().st_size / 1e6
        found = f"{most:.0f} MB at most: {weights:.0f} of the file, {cache:.0f} of the KV cache"
        if most > weights + cache + OVERHEAD_MB:
            raise SystemExit(f"{found}, and more than {OVERHEAD_MB} besides")
        return f"{found}, {max(most - weights - cache, 0):.0f} besides"


@contextmanager
def started(name: str, command: str, model: Path, path: str, is_space: bool = False) -> Iterator[Server]:
    """A server that a command starts, once it answers at a path."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    filled = [part.format(model=model, port=port) for part in shlex.split(command)]
    settings = {"GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(Path(__file__).parents[1])}
    folder = model if is_space else None
    with running_program(filled, subprocess.DEVNULL, settings, folder) as process:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE_S
        while True:
            try:
                if httpx.get(f"{url}{path}").is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} does not start: {shlex.join(filled)}")
        yield Server(name, url, process, is_space)


def write_space(model: Path, folder: Path) -> None:
    """The folder of a Gradio Space that reads a GGUF."""
    copy_package(folder / "smolctl")
    (folder / "app.py").write_text(APP, encoding="utf-8")
    facts = {"title": model.stem, "summary": "", "examples": []}
    (folder / FACTS).write_text(json_text(facts), encoding="utf-8")
    (folder / MODEL).symlink_to(model.resolve())


@dataclass
class Seen:
    """What the clients of one server saw, in seconds, over all rounds with one number of clients."""

    first: list[float] = field(default_factory=list)  # until the first token
    between: list[float] = field(default_factory=list)  # two tokens
    rates: list[float] = field(default_factory=list)  # tokens a second in all, of every round
    failed: int = 0
    held: list[tuple[float, float]] = field(default_factory=list)


def request(chance: random.Random, new_words: int | None) -> dict[str, Any]:
    """A request of mixed length; with `new_words`, of this many words after the common beginning."""
    count = new_words or chance.choice([5, 20, 80, 200])
    text = " ".join(chance.choices(WORDS, k=count))
    begins = new_words is not None or chance.random() < 0.5
    messages = [{"role": "system", "content": BEGINNING}] if begins else []
    return {
        "messages": [*messages, {"role": "user", "content": text}],
        "max_tokens": 64 if new_words else chance.choice([8, 32, 96]),
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def pieces_of(
    client: httpx.AsyncClient, server: Server, body: dict[str, Any], seen: Seen
) -> AsyncIterator[int | str]:
    """Each piece of text as it comes, from a Space the whole answer so far; at last the number of tokens."""
    if server.is_space:
        values = [body["messages"][-1]["content"], body["max_tokens"], 0.0, 1.0, 0, 1.0, 1]
        asked = await client.post(f"{server.url}/gradio_api/call/chat", json={"data": values})
        event = asked.json().get("event_id")
        if event is None:  # as many wait as may
            seen.failed += 1
            return
        url, method, sent = f"{server.url}/gradio_api/call/chat/{event}", "GET", None
    else:
        url, method, sent = f"{server.url}/v1/chat/completions", "POST", body
    async with client.stream(method, url, json=sent) as answer:
        seen.failed += answer.status_code != 200
        async for line in answer.aiter_lines():
            content = json.loads(line[6:]) if line.startswith(("data: {", 'data: ["')) else None
            if isinstance(content, list):
                yield content[0]
            elif content is not None and content.get("choices"):
                if text := content["choices"][0]["delta"].get("content"):
                    yield text
            elif content is not None and content.get("usage"):
                yield content["usage"]["completion_tokens"]


async def ask(
    client: httpx.AsyncClient,
    server: Server,
    body: dict[str, Any],
    seen: Seen,
    closes_after: int | None,
    tokenizer: Tokenizer,
) -> int:
    """Send a request, read its stream and return how many tokens came."""
    started, last, count, text, tokens = time.perf_counter(), 0.0, 0, "", None
    async for piece in pieces_of(client, server, body, seen):
        if isinstance(piece, int):
            tokens = piece
            continue
        text, now = piece if server.is_space else text + piece, time.perf_counter()
        if count:
            seen.between.append(now - last)
        else:
            seen.first.append(now - started)
        count, last = count + 1, now
        if count == closes_after:
            break
    return len(tokenizer.prompt(text).ids) if tokens is None else tokens


async def visit(
    server: Server,
    number: int,
    count: int,
    options: argparse.Namespace,
    seed: int,
    seen: Seen,
    tokenizer: Tokenizer,
) -> int:
    """One client: its requests, one after the other."""
    chance, total = random.Random(f"{seed} {number}"), 0
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        for _ in range(count):
            body = request(chance, options.new_words)
            closes = chance.choice([1, 5, 20]) if options.rough and chance.random() < 0.2 else None
            try:
                total += await ask(client, server, body, seen, closes, tokenizer)
            except httpx.TransportError:
                seen.failed += 1
            if options.rough and chance.random() < 0.2 and not server.is_space:
                answer = await client.post(
                    f"{server.url}/v1/chat/completions", content=chance.choice(GARBAGE)
                )
                seen.failed += not 400 <= answer.status_code < 500
    return total


async def load(
    server: Server,
    clients: int,
    options: argparse.Namespace,
    seed: int,
    seen: Seen,
    tokenizer: Tokenizer,
) -> None:
    """One round of one server."""
    seen.held.append(server.held())
    began, count = time.perf_counter(), max(options.requests // clients, 1)
    visits = [visit(server, number, count, options, seed, seen, tokenizer) for number in range(clients)]
    total = sum(await asyncio.gather(*visits))
    seen.rates.append(total / (time.perf_counter() - began))
    seen.held.append(server.held())


def row(clients: int, server: Server, seen: Seen) -> str:
    def spread(values: Sequence[float]) -> str:
        return " / ".join(f"{1000 * value:.0f}" for value in np.percentile(values or [np.nan], [50, 95, 99]))

    rate = f"{np.median(seen.rates):.0f} ({min(seen.rates):.0f} to {max(seen.rates):.0f})"
    megabytes, files = zip(*seen.held, strict=True)
    held = f"{megabytes[0]:.0f}, {max(megabytes):.0f}", f"{files[0]:.0f}, {files[-1]:.0f}"
    cells = [clients, server.name, rate, spread(seen.first), spread(seen.between), *held, seen.failed]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, metavar="FILE.gguf")
    parser.add_argument("--peer-command", help="starts another server, with {model} and {port} filled in")
    parser.add_argument("--space", action="store_true", help="the Gradio Space too")
    parser.add_argument(
        "--url", action="append", default=[], metavar="NAME=URL", help="one that runs already"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--requests", type=int, default=16, help="in a round, of all clients; one each or more"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new-words", type=int, help="same beginning, so many words more, 64 tokens each")
    parser.add_argument("--rough", action="store_true", help="closed connections and garbage too")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_files(open_source(str(options.model)).require_tokenizer(), str(options.model))
    own = f"{sys.executable} -m smolctl serve {{model}} --port {{port}} --slots {SLOTS} --context {CONTEXT}"
    with ExitStack() as stack:
        servers = [stack.enter_context(started("smolctl serve", own, options.model, "/health"))]
        if options.space:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "space"
            write_space(options.model, folder)
            command = f"{sys.executable} app.py"
            servers.append(stack.enter_context(started("Gradio Space", command, folder, "/", is_space=True)))
        if options.peer_command:
            servers.append(
                stack.enter_context(started("peer", options.peer_command, options.model, "/health"))
            )
        servers += [Server(name, url) for name, _, url in (one.partition("=") for one in options.url)]
        print(f"| {HEAD} |")
        print("|" + "---|" * (HEAD.count("|") + 1))
        for clients in options.clients:
            found = [(server, Seen()) for server in servers]
            for seed in range(options.rounds):
                for server, seen in found:
                    asyncio.run(load(server, clients, options, seed, seen, tokenizer))
            for server, seen in found:
                print(row(clients, server, seen), flush=True)
        print(f"\nsmolctl serve held {servers[0].check_memory(options.model)}.")


if __name__ == "__main__":
    main()
