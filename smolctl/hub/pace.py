"""A least speed for answers: a server that sends a byte now and then keeps nobody waiting for ever.

The client's time limits run from one byte to the next, so that such an answer never ends. Here the limit of
a read is also the time after which the whole answer must have come at `LEAST_BYTES_PER_SECOND` or more: a
small one ends, well or badly, within twice the limit, and a large one lasts as long as it really moves.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl

    import httpcore2
    import httpx2

LEAST_BYTES_PER_SECOND = 1_000  # a third of a modem's of 1998


def paced(client: httpx2.Client) -> httpx2.Client:
    """The client, with a least speed for what it receives."""
    for transport in (client._transport, *client._mounts.values()):
        # httpcore takes its way to the network as an argument, which httpx has no word for; with a transport
        # of our own instead, httpx would leave the environment's proxies out.
        pool = getattr(transport, "_pool", None)
        if pool is not None:
            pool._network_backend = _Backend(pool._network_backend)
    return client


class _Backend:
    """Connections of another backend, with a least speed."""

    def __init__(self, backend: httpcore2.NetworkBackend) -> None:
        self._backend = backend

    def connect_tcp(self, *where: Any, **options: Any) -> _Stream:
        return _Stream(self._backend.connect_tcp(*where, **options))

    def connect_unix_socket(self, *where: Any, **options: Any) -> _Stream:
        return _Stream(self._backend.connect_unix_socket(*where, **options))

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


class _Stream:
    """A connection. Between two requests, when something is sent, its clock starts again."""

    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream
        self._received = 0  # bytes of the answer
        self._waited = 0.0  # seconds for them, from the first one on

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        begin = time.monotonic()
        piece = self._stream.read(max_bytes, timeout)
        self._waited += time.monotonic() - begin if self._received else 0.0
        self._received += len(piece)
        if timeout and self._waited > max(timeout, self._received / LEAST_BYTES_PER_SECOND):
            import httpcore2

            raise httpcore2.ReadTimeout(f"{self._received:,} bytes in {self._waited:.0f} s")
        return piece

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._received, self._waited = 0, 0.0
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> _Stream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
