"""A server in this process, on a free port, for real clients."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from smolctl.generation.engines import EngineOptions
from smolctl.serving.app import Server
from smolctl.serving.serve import ServeOptions, listen, open_server

PATIENCE_S = 20  # for an answer that does not come


@dataclass(frozen=True)
class Served:
    """A server that answers at `url`."""

    server: Server
    url: str
    client: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        """`path` is "completions" or "chat/completions"."""
        return self.client.post(f"/v1/{path}", json=body)

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"smolctl_{name}"))


@contextmanager
def serving(model: Path, send_bytes: int | None = None, **options: Any) -> Iterator[Served]:
    """Serve a model with the options of `ServeOptions`, a single thread computing.

    Args:
        model: a folder.
        send_bytes: that a connection holds of an answer that is not read; None: as the system has it.
        options: of `ServeOptions`.
    """
    with listen("127.0.0.1", 0) as listener:
        if send_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        settings = ServeOptions(**{"slots": 4, "engine": EngineOptions(threads=1), **options})
        server, _ = open_server(str(model), settings, url)
        application = server.application(settings.api_key, settings.hosts)
        running = uvicorn.Server(uvicorn.Config(application, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
        thread.start()
        try:
            with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
                yield Served(server, url, client)
        finally:
            running.should_exit = running.force_exit = True
            thread.join()
            server.service.close()
