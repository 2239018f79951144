"""The server as an ASGI application: paths, answers, errors."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection
from functools import partial
from typing import Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from smolctl.errors import InputError, PromptTooLongError, SmolError
from smolctl.escaping import json_text
from smolctl.generation.service import BusyError, Job, Piece, Service
from smolctl.serving.guards import Guard, Limits
from smolctl.serving.page import page_routes
from smolctl.serving.requests import ApiError, ApiRequest, parse_body, parse_request, sentences
from smolctl.serving.responses import Responder

EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # otherwise nginx buffers the stream
)
RETRY = {"retry-after": "1"}


class Server:
    """Answers requests of OpenAI's API with a service.

    Args:
        service: generates.
        name: of the model.
        limits: of a request.
    """

    def __init__(self, service: Service, name: str, limits: Limits) -> None:
        self.service, self.name, self.limits = service, name, limits
        self._started = int(time.time())
        self._statuses: Counter[int] = Counter()
        self.stopped = asyncio.Event()  # ends answers in progress with an error
        self._routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/v1/chat/completions", partial(self._complete, chat=True), methods=["POST"]),
            Route("/v1/completions", partial(self._complete, chat=False), methods=["POST"]),
        ]

    def application(self, api_key: str | None, hosts: Collection[str] | None) -> Starlette:
        """The ASGI application; see `Guard` for the arguments. With an API key, there is no chat page."""
        own = page_routes(self.service, self.name) if api_key is None else [Route("/", self._index)]
        return Starlette(
            routes=[*own, *self._routes],
            middleware=[Middleware(Guard, limits=self.limits, api_key=api_key, hosts=hosts)],
            exception_handlers={ApiError: _refuse, HTTPException: _not_there, Exception: _unexpected},
        )

    async def _index(self, request: Request) -> Response:
        paths = (route.path for route in self._routes if "{" not in route.path)
        return PlainTextResponse("\n".join((f"smolctl serves {self.name} with OpenAI's API:", *paths, "")))

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, request: Request) -> Response:
        self._require_model(request.path_params["model"])
        return JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        limits = {"max_model_len": self.service.capacity}  # vLLM's name
        return {"id": self.name, "object": "model", "created": self._started, "owned_by": "smolctl", **limits}

    def _require_model(self, name: object) -> None:
        if name not in (self.name, self.service.model.id):
            raise ApiError(
                404, f"This server does not have that model; it has {self.name}.", "model_not_found", "model"
            )

    async def _metrics(self, request: Request) -> Response:
        scheduler = self.service.scheduler
        counts = scheduler.counts
        samples = [
            ("prompt_tokens_total", "counter", "Prompt tokens that were read.", counts.prefilled),
            ("prompt_tokens_reused_total", "counter", "Prompt tokens that were in the cache.", counts.reused),
            ("generated_tokens_total", "counter", "Tokens that were generated.", counts.generated),
            ("decode_calls_total", "counter", "Calls of the engine after the prompts.", counts.steps),
            ("answers_active", "gauge", "Answers that are being generated.", scheduler.active),
            ("answers_waiting", "gauge", "Answers that wait for a slot.", scheduler.waiting),
            ("slots", "gauge", "Answers that can be generated at once.", self.service.slots),
            ("cache_bytes", "gauge", "Size of the KV cache.", self.service.cache_bytes),
        ]
        lines = []
        for name, kind, text, value in samples:
            lines += [
                f"# HELP smolctl_{name} {text}",
                f"# TYPE smolctl_{name} {kind}",
                f"smolctl_{name} {value}",
            ]
        lines += [
            "# HELP smolctl_requests_total Requests for answers by HTTP status.",
            "# TYPE smolctl_requests_total counter",
        ]
        lines += [
            f'smolctl_requests_total{{status="{status}"}} {n}' for status, n in sorted(self._statuses.items())
        ]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def _complete(self, request: Request, chat: bool) -> Response:
        try:
            body = parse_body(await request.body())
            if "model" in body:
                self._require_model(body["model"])
            # Tokenizing a long prompt and rendering a template take time.
            parse = partial(parse_request, body, self.service.model, self.service.capacity, chat)
            return _Answer(self, await to_thread.run_sync(parse))
        except ApiError as error:
            self.count(error.status)
            raise
        except SmolError as error:
            self.count(400)
            raise _api_error(error) from None

    def stop(self) -> None:
        """End all answers in progress with an error."""
        self.stopped.set()

    def count(self, status: int) -> None:
        """Count a request by its status."""
        self._statuses[status] += 1


class _Answer(Response):
    """An answer that is sent while it is generated. If the client disconnects, generation stops."""

    def __init__(self, server: Server, request: ApiRequest) -> None:
        super().__init__()
        self._server, self._request = server, request
        self._responder = Responder(request, server.name, server.service.model.tokenizer)
        self._started = False  # whether the headers were sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, limits = self._server.service, self._server.limits
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | SmolError] = asyncio.Queue()

        def listen(piece: Piece | SmolError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so there is no receiver
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job: Job | None = None
        try:
            job = service.start(self._request.prompts, listen)
            sending = asyncio.ensure_future(self._send(pieces, send))
            leaving = asyncio.ensure_future(_until_left(receive))
            stopping = asyncio.ensure_future(self._server.stopped.wait())
            waiting = (sending, leaving, stopping)
            try:
                async with asyncio.timeout(limits.answer_s):
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
                    self._server.count(200)
                elif leaving.done():
                    self._server.count(499)  # nginx's status for clients that closed the connection
                else:
                    raise ApiError(503, "The server is being stopped.")
            finally:
                for one in waiting:
                    one.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
        except TimeoutError:
            await self._fail(
                ApiError(504, f"The answer took more than {limits.answer_s:g} seconds."), scope, receive, send
            )
        except ApiError as error:
            await self._fail(error, scope, receive, send)
        except SmolError as error:
            await self._fail(_api_error(error), scope, receive, send)
        finally:
            if job is not None:
                service.cancel(job)

    async def _send(self, pieces: asyncio.Queue[Piece | SmolError], send: Send) -> None:
        responder = self._responder
        if not self._request.stream:
            async for piece in self._pieces(pieces, None, send):
                list(responder.add(piece))
            self._started = True
            await JSONResponse(responder.whole())({"type": "http"}, _nothing, send)
            return
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        for chunk in responder.opening():
            await _event(send, chunk)
        async for piece in self._pieces(pieces, self._server.limits.ping_s or None, send):
            for chunk in responder.add(piece):
                await _event(send, chunk)
        for chunk in responder.closing():
            await _event(send, chunk)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _pieces(
        self, pieces: asyncio.Queue[Piece | SmolError], ping_s: float | None, send: Send
    ) -> AsyncIterator[Piece]:
        """Yield the pieces of the answer, and a comment whenever none came for a while."""
        while not self._responder.done:
            try:
                async with asyncio.timeout(ping_s):
                    piece = await pieces.get()
            except TimeoutError:
                await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
                continue
            if isinstance(piece, SmolError):
                raise piece
            yield piece
            await asyncio.sleep(0)  # lets the loop notice disconnected clients, because sending rarely waits

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Report an error: as the response, or as the last event of a stream that has started."""
        self._server.count(error.status)
        if not self._started:
            headers = RETRY if error.status == 503 else None
            await JSONResponse(error.body(), error.status, headers)(scope, receive, send)
        elif self._request.stream:
            # A client that does not read cannot receive the error either.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._server.limits.farewell_s):
                    await _event(send, error.body())
                    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _event(send: Send, content: dict[str, Any]) -> None:
    body = f"data: {json_text(content)}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _nothing() -> Any:
    raise AssertionError("an answer that is sent reads nothing")


async def _until_left(receive: Receive) -> None:
    """Wait until the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _api_error(error: SmolError) -> ApiError:
    message = sentences(error)
    if isinstance(error, BusyError):
        return ApiError(503, message)
    if isinstance(error, PromptTooLongError):
        # Clients recognize these words in addition to the code.
        message = f"The prompt is too long: {error.message}. {error.hint}"
        return ApiError(400, message, "context_length_exceeded")
    return ApiError(400 if isinstance(error, InputError) else 500, message)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status)


async def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {
        404: f"There is no {request.url.path} here.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    reason = ApiError(error.status_code, what.get(error.status_code, f"{error.detail}."))
    return JSONResponse(reason.body(), reason.status, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "The server has failed; see its log.").body(), 500)
