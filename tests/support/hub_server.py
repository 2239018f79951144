"""A loopback server that speaks as much of the Hub's protocol as reading models and datasets needs.

It is driven by the real client: point `HF_ENDPOINT` at `HubServer.url`.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from smolctl.sources.huggingface.card import read_metadata, split_card
from tests.support.loopback import Loopback

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_goodtoken"


@dataclass
class HubRepository:
    """One repository: its files, and how it answers. A dataset's name begins with `datasets/`."""

    files: dict[str, bytes]
    commit: str = COMMIT
    gated: bool = False
    private: bool = False


@dataclass(frozen=True)
class Request:
    """One line of the server's log."""

    method: str
    path: str
    range: str | None
    bytes_sent: int


@dataclass
class HubServer(Loopback):
    """Serve repositories while in a `with` block.

    Attributes:
        fails_with: answer every request with this status,
        error_code: with this code of the Hub's own,
        error_message: and with these words.
        hangs_for: seconds that every answer waits.
        knows_sizes: whether it says how long a file is of which a part is asked for.
        drips: seconds between one byte of an answer and the next; with `drips_from`, from that byte on.
    """

    repositories: dict[str, HubRepository] = field(default_factory=dict)
    fails_with: int | None = None
    error_code: str = ""
    error_message: str = "the Hub is out of order"
    hangs_for: float = 0.0
    drips: float = 0.0
    drips_from: int = 0
    ignores_range: bool = False
    knows_sizes: bool = True
    log: list[Request] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_state = hub

        self.serve(Handler)
        return self

    def bytes_sent(self, ending: str = "") -> int:
        """Bytes of all answers to paths with an ending."""
        return sum(request.bytes_sent for request in self.log if request.path.endswith(ending))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer
    disable_nagle_algorithm = True
    server_state: HubServer

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        """Of all questions that are posted only one is answered: what a dataset's paths are."""
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        repository = self.server_state.repositories.get("/".join(parts[1:4]))
        if repository is None or parts[4:5] != ["paths-info"]:
            return self._send(404, b"{}", {}, True)
        paths = asked.get("paths", [])
        found = [entry for entry in _tree(repository) if entry["path"] in paths]
        return self._send(200, json.dumps(found).encode(), {}, True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        state = self.server_state
        if state.hangs_for:
            time.sleep(state.hangs_for)
        status, body, headers = self._route(unquote(urlsplit(self.path).path).strip("/").split("/"))
        self._send(status, body, headers, with_body)

    def _route(self, parts: list[str]) -> tuple[int, bytes, dict[str, str]]:
        state = self.server_state
        if state.fails_with:
            return self._error(state.fails_with, state.error_code, state.error_message)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            return self._error(401, "", "Invalid credentials in Authorization header")
        api = parts[0] == "api"
        if api and parts[1] == "models":
            parts = [parts[0], *parts[2:]]  # their names have no first part
        start = 1 if api else 0
        end = start + (3 if parts[start] == "datasets" else 2)
        name, rest = "/".join(parts[start:end]), parts[end:]
        repository = self.server_state.repositories.get(name)
        if repository is None or (repository.private and not token):
            return self._error(404 if token else 401, "RepoNotFound", "Repository not found")
        return self._api(name, repository, rest) if api else self._file(repository, rest, token)

    def _api(
        self, name: str, repository: HubRepository, rest: list[str]
    ) -> tuple[int, bytes, dict[str, str]]:
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", repository.commit):
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        if rest[:1] == ["tree"]:
            folder = "".join(f"{part}/" for part in rest[2:])
            tree = [entry for entry in _tree(repository) if entry["path"].startswith(folder)]
            if folder and not tree:
                return self._error(404, "EntryNotFound", "Entry not found")
            return 200, json.dumps(tree).encode(), {}
        info = {
            "id": name,
            "modelId": name,
            "sha": repository.commit or None,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "siblings": [{"rfilename": path} for path in repository.files],
            "cardData": read_metadata(split_card(repository.files.get("README.md", b"").decode())[0]),
        }
        return 200, json.dumps(info).encode(), {}

    def _file(
        self, repository: HubRepository, rest: list[str], token: str
    ) -> tuple[int, bytes, dict[str, str]]:
        if len(rest) < 3 or rest[0] != "resolve":
            return self._error(404, "EntryNotFound", "Entry not found")
        if repository.gated and not token:
            return self._error(401, "GatedRepo", "Access to this model is restricted")
        if rest[1] not in ("main", repository.commit):
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        content = repository.files.get("/".join(rest[2:]))
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {
            "X-Repo-Commit": repository.commit,
            "ETag": f'"{_etag(content)}"',
            "Accept-Ranges": "bytes",
        }
        asked = self.headers.get("Range")
        if not asked or self.server_state.ignores_range:
            return 200, content, headers
        start, _, end = asked.removeprefix("bytes=").partition("-")
        last = min(int(end), len(content) - 1) if end else len(content) - 1
        whole = len(content) if self.server_state.knows_sizes else "*"
        headers["Content-Range"] = f"bytes {start}-{last}/{whole}"
        return 206, content[int(start) : last + 1], headers

    def _error(self, status: int, code: str, message: str) -> tuple[int, bytes, dict[str, str]]:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        return status, json.dumps({"error": message}).encode(), headers

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        sent = body if with_body else b""
        path = urlsplit(self.path).path
        self.server_state.log.append(Request(self.command, path, self.headers.get("Range"), len(sent)))
        if self.server_state.drips:
            self.wfile = Dripping(self.wfile, self.server_state)
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)
            self.wfile.flush()
        except OSError:
            self.close_connection = True  # the client has gone, as one that waited too long does


class Dripping(io.BytesIO):
    """What goes out byte by byte when it is flushed."""

    def __init__(self, out: Any, state: HubServer) -> None:
        super().__init__()
        self.out, self.drips, self.drips_from = out, state.drips, state.drips_from

    def flush(self) -> None:
        for place, byte in enumerate(self.getvalue()):
            self.out.write(bytes([byte]))
            if place >= self.drips_from:
                self.out.flush()
                time.sleep(self.drips)
        self.out.flush()
        self.truncate(0)
        self.seek(0)


def _tree(repository: HubRepository) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
        for path, content in repository.files.items()
    ]


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
