"""`smolctl serve`: serves a model with OpenAI's API until the process is stopped."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from smolctl.errors import InputError, SmolError, UsageError
from smolctl.generation.engines import EngineOptions
from smolctl.generation.load import load_model
from smolctl.generation.service import Service
from smolctl.serving.app import Server
from smolctl.serving.guards import Limits
from smolctl.sources.address import WEIGHT_ENDINGS

DEFAULT_CONTEXT = 2048  # tokens per slot, or fewer if the model's context is shorter
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
GRACE_S = 30  # for answers in progress when the server is stopped
UNREAD_S = 60.0  # after which the system disconnects a client that does not read (Linux)


@dataclass(frozen=True)
class ServeOptions:
    """How to serve a model.

    Raises:
        UsageError: other machines could use it without a key although that was not allowed, or no client
            could send the key.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free port
    api_key: str | None = None
    no_api_key: bool = False  # whether other machines may connect without a key
    slots: int = 8
    context: int | None = None  # tokens per slot; None: `DEFAULT_CONTEXT`
    limits: Limits = field(default_factory=Limits)
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and (not key or key != key.strip() or not key.isprintable()):
            raise UsageError(
                "--api-key is empty, or has spaces or line ends around it, which no client can send",
                "Give a key such as `openssl rand -hex 16` prints, or leave the option out.",
            )
        if not key and not self.no_api_key and not is_loopback(self.host):
            raise UsageError(
                f"--host {self.host} accepts other machines without a key",
                "Add --api-key KEY, or --no-api-key if everybody may use it.",
            )

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Host names that requests may use; None: any."""
        if self.api_key or not is_loopback(self.host):
            return None
        return (*LOOPBACK, self.host.lower())


@dataclass(frozen=True)
class Ready:
    """Event: the server is ready."""

    url: str
    model: str  # as clients name it
    engine: str
    slots: int
    context: int  # tokens of a prompt and its answer
    weight_bytes: int
    cache_bytes: int  # of the KV cache: it grows to this and no further
    page: str | None = None  # address of the chat page; None: there is none, as it could not send the key
    notes: tuple[str, ...] = ()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def serve(model: str, options: ServeOptions, on_ready: Callable[[Ready], None]) -> None:
    """Serve a model until SIGINT or SIGTERM; then answers in progress have `GRACE_S` to finish, and no new
    ones start.

    After that time, or a second signal, they end with an error.

    Args:
        model: what `load_model` takes.
        options: how to serve it.
        on_ready: called when the server is ready.

    Raises:
        SmolError: the model cannot be read or run, or the address is not available.
    """
    listener = listen(options.host, options.port)
    with listener:
        server, ready = open_server(model, options, _url(options.host, listener))
        config = uvicorn.Config(
            server.application(options.api_key, options.hosts),
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=GRACE_S + int(options.limits.farewell_s) + 1,
        )
        try:
            running = _Running(config, lambda: on_ready(ready), server.stop)
            running.run([listener])
        finally:
            server.service.close()


def open_server(model: str, options: ServeOptions, url: str) -> tuple[Server, Ready]:
    """Create the server and its description.

    Raises:
        SmolError: the model cannot be read or run, or its context is shorter than requested.
    """
    loaded = load_model(model, options.engine)
    context = options.context or min(DEFAULT_CONTEXT, loaded.context)
    if context > loaded.context:
        raise InputError(
            f"--context {context:,}: the model's context holds {loaded.context:,} tokens",
            "Choose a smaller --context.",
        )
    service = Service(loaded, options.slots, context, options.limits.waiting)
    name = Path(model).stem if Path(model).suffix in WEIGHT_ENDINGS else model
    name = Path(name).name if Path(model).exists() else name
    engine, notes = loaded.engine, loaded.notes
    ready = Ready(
        url=url,
        model=name,
        engine=engine.name,
        slots=options.slots,
        context=context,
        weight_bytes=engine.weight_bytes,
        cache_bytes=service.cache_bytes,
        page=None if options.api_key else f"{url}/",
        notes=notes,
    )
    return Server(service, name, options.limits), ready


class _Running(uvicorn.Server):
    """A uvicorn server that reports its start, and ends answers after the grace period."""

    def __init__(
        self, config: uvicorn.Config, on_started: Callable[[], None], stop: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_started, self._stop = on_started, stop
        self._loop: asyncio.AbstractEventLoop | None = None  # of the server, while answers are being ended

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        waiting = self._loop.call_later(GRACE_S, self._stop)
        await super().shutdown(sockets)
        waiting.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None:
            super().handle_exit(sig, frame)
        else:  # a second signal
            self._loop.call_soon_threadsafe(self._stop)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket at an address, before the model is loaded.

    Raises:
        SmolError: the address is not available.
    """
    name = host.strip("[]")
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    # With this protocol number asyncio disables Nagle's algorithm; otherwise a token waits 40 ms for the
    # next.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNREAD_S))
        listener.bind((name, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise SmolError(
            f"{host}:{port} cannot be served ({reason})", "Choose another --host or --port."
        ) from None
    return listener


def _url(host: str, listener: socket.socket) -> str:
    name = f"[{host.strip('[]')}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
