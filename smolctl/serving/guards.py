"""Access control and limits, checked before a request's body is read."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smolctl.serving.requests import ApiError

OPEN_PATHS = ("/", "/health")  # answered without a key


@dataclass(frozen=True)
class Limits:
    """Limits of a server. Times in seconds."""

    waiting: int = 64  # answers that wait for a slot
    connections: int = 256  # concurrent requests of any kind
    body_bytes: int = 8 << 20
    body_s: float = 30.0  # for a body to arrive
    answer_s: float = 600.0  # for an answer, including its time in the queue
    farewell_s: float = 5.0  # for a client to receive the error that ends a stream
    ping_s: float = 15.0  # between comments in a stream without other data; 0: none


class Guard:
    """An ASGI application that passes on permitted requests.

    Any web page can make its visitor's browser send requests to this server, and can point its own host name
    to this machine. Therefore, without a key, Host must be one of `hosts`, and so must Origin if it is sent.

    Args:
        app: gets the permitted requests.
        limits: of a request.
        api_key: the bearer token that clients must send; None: none is needed.
        hosts: permitted host names of this server; None: any.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, api_key: str | None, hosts: Collection[str] | None
    ) -> None:
        self._app, self._limits, self._hosts = app, limits, hosts
        self._key = None if api_key is None else api_key.encode()
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._under_way += 1
        try:
            self._check(Headers(scope=scope), scope["path"], scope["method"])
            body = await self._body(Headers(scope=scope), receive)
        except ApiError as error:
            headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
            headers |= {"connection": "close"} if error.status in (408, 413) else {}
            await JSONResponse(error.body(), error.status, headers)(scope, receive, send)
        else:
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._under_way -= 1

    def _check(self, headers: Headers, path: str, method: str) -> None:
        if self._under_way > self._limits.connections:
            raise ApiError(503, "Too many requests are under way. Try again in a moment.")
        if self._hosts is not None:
            origin = headers.get("origin")
            named = headers.get("host", ""), *(() if origin is None else (urlsplit(origin).netloc,))
            if any(_without_port(name) not in self._hosts for name in named):
                raise ApiError(
                    403,
                    "This server answers requests to its own address only, not those of other pages.",
                )
        # A browser sends no key with a preflight request.
        if self._key is not None and path not in OPEN_PATHS and method != "OPTIONS":
            kind, _, given = headers.get("authorization", "").partition(" ")
            key = given.strip().encode("latin-1")  # the bytes as received
            if kind.lower() != "bearer" or not hmac.compare_digest(key, self._key):
                raise ApiError(401, "The API key is missing or wrong.", "invalid_api_key")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        too_large = ApiError(413, f"The body has more than {self._limits.body_bytes:,} bytes.")
        said = headers.get("content-length", "0")
        if said.isdecimal() and int(said[:20]) > self._limits.body_bytes:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self._limits.body_s):
                while more:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._limits.body_bytes:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {self._limits.body_s:g} seconds.") from None
        return bytes(body)


def _without_port(netloc: str) -> str:
    """The name in "name:8000" or "[::1]:8000", in lower case."""
    name, colon, port = netloc.rpartition(":")
    return (name if colon and port.isdecimal() else netloc).lower()


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns a body that was already read, and then later messages."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
