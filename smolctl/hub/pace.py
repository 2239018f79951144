"""A minimum speed for responses: a server that sends a byte from time to time cannot block a client forever.

The client's time limits apply from one byte to the next, so such a response would never end. Here, the read
limit is also the time after which the whole response must have arrived at `LEAST_BYTES_PER_SECOND` or more: a
small response ends, with or without success, within twice the limit, and a large one may take as long as it
makes progress.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl

    import httpcore2
    import httpx2

LEAST_BYTES_PER_SECOND = 1_000  # a third of the speed of a modem of 1998


def paced(client: httpx2.Client) -> httpx2.Client:
    """The client with a minimum speed for what it receives."""
    for transport in (client._transport, *client._mounts.values()):
        # httpcore takes its network backend as an argument, which httpx does not expose; with a custom
        # transport, httpx would ignore the environment's proxies.
        pool = getattr(transport, "_pool", None)
        if pool is not None:
            pool._network_backend = _Backend(pool._network_backend)
    return client


class _Backend:
    """Connections of another backend, with a minimum speed."""

    def __init__(self, backend: httpcore2.NetworkBackend) -> None:
        self._backend = backend

    def connect_tcp(self, *where: Any, **options: Any) -> _Stream:
        return _Stream(self._backend.connect_tcp(*where, **options))

    def connect_unix_socket(self, *where: Any, **options: Any) -> _Stream:
        return _Stream(self._backend.connect_unix_socket(*where, **options))

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


class _Stream:
    """A connection. Its clock restarts with the next request, when something is sent."""

    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream
        self._received = 0  # bytes of the response
        self._waited = 0.0  # seconds since its first byte

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
