"""The chat page at `/`: the page of `push --page`, with this server as its engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from smolctl.generation.sampling import resolve_sampling
from smolctl.generation.service import Service
from smolctl.page.chat import accepts_system
from smolctl.page.folder import BEGINNINGS, CODE, FORMAT, MAX_TOKENS, PAGE, QUESTIONS, VERSION

TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
OURS = "'self'"
POLICY = {
    **dict.fromkeys(("script-src", "style-src", "img-src", "worker-src", "connect-src"), OURS),
    **dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"),
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # the files differ between versions of smolctl
}
EXAMPLES = 2


def page_routes(service: Service, name: str) -> list[Route]:
    """All files of a model's page, by name."""
    files = {path.name: path for path in CODE.iterdir() if path.suffix in TYPES}
    files |= {"": files["index.html"], "worker.js": Path(__file__).with_name("worker.js")}
    content = JSONResponse(_content(service, name), headers=HEADERS)
    routes = [Route(f"/{path}", partial(_file, file)) for path, file in files.items()]
    return [*routes, Route(f"/{PAGE}", lambda _request: content)]


async def _file(path: Path, request: Request) -> Response:
    return FileResponse(path, media_type=TYPES[path.suffix], headers=HEADERS)


def _content(service: Service, name: str) -> Mapping[str, Any]:
    """page.json; for pages that run the model themselves, `page.folder.write_page` writes it."""
    model = service.model
    chat = {"takes_system": accepts_system(model.tokenizer), "system": None} if model.can_chat else None
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": name,
        "summary": "The model runs on the server that this page comes from.",
        "facts": [("Engine", model.engine.name), ("Answers at once", str(service.slots))],
        "links": [],
        "examples": (QUESTIONS if model.can_chat else BEGINNINGS)[:EXAMPLES],
        "context": service.capacity,
        "models": [{"folder": ".", "scheme": model.engine.precision, "bytes": 0, "verdict": None}],
        "chat": chat,
        "sampling": {**asdict(resolve_sampling({}, model.recommended)), "max_tokens": MAX_TOKENS},
        "server": True,
    }
