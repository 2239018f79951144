"""Serves a page's folder on this machine, with the headers of a Space."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

# With the first two, a browser allows the page to share memory between threads; they are in the Space's front
# matter as `custom_headers`.
ISOLATION = {
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "cross-origin",
}
PREVIEW_PORT = 7860  # Gradio's port, so that both kinds of Space have the same preview address
TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    "": "application/octet-stream",
}


class PageHandler(SimpleHTTPRequestHandler):
    """Serves the files of one folder without logging."""

    protocol_version = "HTTP/1.1"
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, **TYPES}  # noqa: RUF012

    def __init__(self, *arguments: Any, headers: Mapping[str, str] = ISOLATION, **options: Any) -> None:
        self._sent = headers
        super().__init__(*arguments, **options)

    def end_headers(self) -> None:
        for name, value in self._sent.items():
            self.send_header(name, value)
        self.send_header("cache-control", "no-cache")  # so that a rebuilt page is shown immediately
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


class PageServer(ThreadingHTTPServer):
    """Serves a folder on this machine only.

    Args:
        folder: of the page.
        port: 0 chooses a free one.
        handler: called like PageHandler, with the keyword `directory`.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0, handler: type[PageHandler] = PageHandler) -> None:
        super().__init__(("127.0.0.1", port), partial(handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes a connection is not an error."""


@contextlib.contextmanager
def serving(server: PageServer) -> Iterator[str]:
    """Serve in the background during the block; yields the address."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def preview_server(folder: Path) -> PageServer:
    """A server for people, on a fixed port if that is free, because browsers cache the model by address."""
    try:
        return PageServer(folder, PREVIEW_PORT)
    except OSError:
        return PageServer(folder)
