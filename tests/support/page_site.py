"""A page that runs a tiny model, and a server for it that can spoil what it sends."""

from __future__ import annotations

import mimetypes
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from smolctl.page import folder as page_folder
from smolctl.page.folder import PageText, write_page
from smolctl.quantization.quantize import QuantizeOptions, quantize
from tests.support.loopback import Loopback
from tests.support.tiny_models import TEMPLATE, write_folder

CONTEXT = 4096
TITLE = "tiny & <b>small</b>"
EXAMPLE = "the cat sat"
VERDICT = "int8: as good as the original on 4,096 tokens"
SAMPLING = {"temperature": 0.7, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
PART_BYTES = 8 << 10  # several parts, although the model is tiny

Spoil = Callable[[bytes], bytes | int]


def write_site(work: Path, template: str | None = TEMPLATE) -> Path:
    """The page of a tiny model in int8 and int4, which chats, or without a template continues texts."""
    model = write_folder(work / "source", template=template, context=CONTEXT)
    schemes = ("int8", "int4")
    quantize(str(model), QuantizeOptions(schemes, out=work / "small", measure=False))
    text = PageText(
        TITLE,
        "a model for tests",
        [("License", "none")],
        [("Code", "https://example.com/code")],
        [EXAMPLE, "on the mat"],
    )
    site = work / "site"
    site.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_folder, "PART_BYTES", PART_BYTES)
        write_page(site, [work / "small" / scheme for scheme in schemes], text, {"int8": VERDICT})
    return site


class PageServer(Loopback):
    """Sends a page's files, counts the requests for each, and spoils those that a test names.

    Args:
        folder: of the page.
        headers: beside the usual ones.
    """

    def __init__(self, folder: Path, headers: dict[str, str] | None = None) -> None:
        self.folder, self.headers = folder, headers or {}
        self.requests: Counter[str] = Counter()
        self._spoils: dict[str, list[Spoil]] = {}

    def spoil(self, path: str, change: Spoil, times: int = 1_000) -> None:
        """Send another body, or a status, the next `times` that a path is asked for."""
        self._spoils[path] = [change] * times

    def prepend(self, path: str, script: str, times: int = 1_000) -> None:
        """Run a script before a module's own code."""
        self.spoil(path, lambda body: script.encode() + b"\n" + body, times)

    def mend(self) -> None:
        self._spoils = {}

    def __enter__(self) -> PageServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.split("?")[0].lstrip("/") or "index.html"
                server.requests[path] += 1
                file = server.folder / path
                body: bytes | int = file.read_bytes() if file.is_file() else 404
                spoils = server._spoils.get(path)
                if spoils and isinstance(body, bytes):
                    body = spoils.pop()(body)
                self.send_response(body if isinstance(body, int) else 200)
                kind = "text/javascript" if path.endswith(".js") else mimetypes.guess_type(path)[0]
                sent = body if isinstance(body, bytes) else b""
                fields = {
                    "Content-Type": kind or "application/octet-stream",
                    "Content-Length": str(len(sent)),
                }
                for name, value in {**fields, **server.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(ConnectionError):  # the page was left
                    self.wfile.write(sent)

            def log_message(self, *_arguments: object) -> None:
                pass

        self.serve(Handler)
        return self
