"""Servers of OpenAI's API under load: tokens a second in all, and how long clients wait.

    smolctl serve FILE.gguf --port 8001 &
    python -m llama_cpp.server --model FILE.gguf --port 8002 &
    python benchmarks/serve.py smolctl=http://127.0.0.1:8001=PID llama.cpp=http://127.0.0.1:8002=PID

The servers take turns, round by round, with the same requests. Each of the clients sends one request after
the other, with prompts and answers of mixed lengths; half of the prompts begin alike. With --rough, some
clients close the connection in the middle, and some send garbage. Prints a Markdown table. PID may be left
out; with it the table has the memory of the server, before the load and at most.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

BEGINNING = "You are a patient gardener who answers in short sentences and never names a price. " * 6
WORDS = ("the", "old", "garden", "behind", "a", "house", "near", "the", "river", "where", "apples", "grow")
PATIENCE_S = 600
HEAD = (
    "clients | server | tok/s in all | first token, ms (p50 / p95 / p99) | between tokens, ms | MB | failed"
)
GARBAGE = (b"", b"{", b"[]", b'{"messages": 5}', b'{"messages": [], "n": 1e9}', b"\xff" * 1_000)


@dataclass(frozen=True)
class Server:
    """A server to measure."""

    name: str
    url: str
    pid: int | None

    @staticmethod
    def parse(text: str) -> Server:
        name, url, *pid = text.split("=")
        return Server(name, url, int(pid[0]) if pid else None)

    def memory(self) -> float:
        """Resident megabytes of the process; NaN where it is not known."""
        if self.pid is None:
            return float("nan")
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmRSS:")[2].split()[0]) / 1000


@dataclass
class Seen:
    """What the clients of one server saw, in seconds, over all rounds with one number of clients."""

    first: list[float] = field(default_factory=list)  # until the first token
    between: list[float] = field(default_factory=list)  # two tokens
    rates: list[float] = field(default_factory=list)  # tokens a second in all, of every round
    failed: int = 0
    memory: list[float] = field(default_factory=list)


def request(chance: random.Random, new_words: int | None) -> dict[str, object]:
    """A request of mixed length; with `new_words`, of so many words behind the common beginning."""
    count = new_words or chance.choice([5, 20, 80, 300])
    text = " ".join(chance.choices(WORDS, k=count))
    begins = new_words is not None or chance.random() < 0.5
    messages = [{"role": "system", "content": BEGINNING}] if begins else []
    return {
        "messages": [*messages, {"role": "user", "content": text}],
        "max_tokens": 64 if new_words else chance.choice([8, 32, 96]),
        "temperature": 0,
        "stream": True,
    }


async def ask(
    client: httpx.AsyncClient, url: str, body: dict[str, object], seen: Seen, closes_after: int | None
) -> int:
    """Send a request, read its stream and return how many pieces came."""
    started, pieces, last = time.perf_counter(), 0, 0.0
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        seen.failed += answer.status_code != 200
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line[6:]).get("choices")
            if not choices or not choices[0]["delta"].get("content"):
                continue
            now = time.perf_counter()
            if pieces:
                seen.between.append(now - last)
            else:
                seen.first.append(now - started)
            pieces, last = pieces + 1, now
            if pieces == closes_after:
                break
    return pieces


async def visit(server: Server, number: int, options: argparse.Namespace, seed: int, seen: Seen) -> int:
    """One client: its requests, one after the other."""
    chance, total = random.Random(f"{seed} {number}"), 0
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        for _ in range(options.requests):
            body = request(chance, options.new_words)
            closes = chance.choice([1, 5, 20]) if options.rough and chance.random() < 0.2 else None
            total += await ask(client, server.url, body, seen, closes)
            if options.rough and chance.random() < 0.2:
                answer = await client.post(
                    f"{server.url}/v1/chat/completions", content=chance.choice(GARBAGE)
                )
                seen.failed += not 400 <= answer.status_code < 500
    return total


async def load(server: Server, clients: int, options: argparse.Namespace, seed: int, seen: Seen) -> None:
    """One round of one server."""
    seen.memory.append(server.memory())
    started = time.perf_counter()
    visits = [visit(server, number, options, seed, seen) for number in range(clients)]
    total = sum(await asyncio.gather(*visits))
    seen.rates.append(total / (time.perf_counter() - started))
    seen.memory.append(server.memory())


def row(clients: int, server: Server, seen: Seen) -> str:
    def spread(values: Sequence[float]) -> str:
        return " / ".join(f"{1000 * value:.0f}" for value in np.percentile(values or [np.nan], [50, 95, 99]))

    rate = f"{np.median(seen.rates):.0f} ({min(seen.rates):.0f} to {max(seen.rates):.0f})"
    memory = f"{seen.memory[0]:.0f}, {max(seen.memory):.0f}"
    cells = [clients, server.name, rate, spread(seen.first), spread(seen.between), memory, seen.failed]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("servers", nargs="+", type=Server.parse, metavar="NAME=URL[=PID]")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-words", type=int, help="same beginning, so many words more, 64 tokens each")
    parser.add_argument("--rough", action="store_true", help="closed connections and garbage too")
    options = parser.parse_args()
    print(f"| {HEAD} |")
    print("|---|---|---|---|---|---|---|")
    for clients in options.clients:
        found = {server: Seen() for server in options.servers}
        for seed in range(options.rounds):
            for server, seen in found.items():
                asyncio.run(load(server, clients, options, seed, seen))
        for server, seen in found.items():
            print(row(clients, server, seen), flush=True)


if __name__ == "__main__":
    main()
