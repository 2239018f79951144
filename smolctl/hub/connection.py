"""Connections to the Hub: address, client and time limits."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smolctl.errors import InputError
from smolctl.hub.pace import paced

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

CONNECT_SECONDS = 10.0
TIMEOUT_S = 120.0  # between two bytes of a response: the Hub works that long on a large commit
READ_TIMEOUT_S = 30.0  # the same for requests that change nothing, such as a list of files
TIMEOUT_VARIABLE = "SMOLCTL_HUB_TIMEOUT"  # seconds, instead of TIMEOUT_S and HF_HUB_ETAG_TIMEOUT


def endpoint() -> str:
    """The Hub's address in the current environment; the client reads it only once, when it is imported."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def api(token: str | None = None) -> HfApi:
    """The Hub's own client with smolctl's address and time limit.

    Args:
        token: sent with every request; None leaves the choice to the client, which may send none.
    """
    from huggingface_hub import HfApi

    session()
    return HfApi(endpoint=endpoint(), token=token)


def session() -> httpx2.Client:
    """The HTTP session that the Hub's client shares, with a time limit.

    The client's default session waits forever. A session with its own limit, which a program that uses this
    library may have configured with its proxies, is not changed.
    """
    import httpx2
    from huggingface_hub import get_session, set_client_factory

    default = get_session()
    if default.timeout == httpx2.Timeout(None) and _limit not in default.event_hooks["request"]:
        hooks = {**default.event_hooks, "request": [*default.event_hooks["request"], _limit]}

        def make() -> httpx2.Client:
            return paced(httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=None))

        set_client_factory(make)
    return get_session()


def _limit(request: httpx2.Request) -> None:
    """Add time limits that a request does not set; many of the client's requests set none."""
    seconds = timeout_or(READ_TIMEOUT_S if request.method in ("GET", "HEAD") else TIMEOUT_S)
    limits = {"connect": min(seconds, CONNECT_SECONDS), "read": seconds, "write": seconds, "pool": seconds}
    named = {key: limit for key, limit in request.extensions["timeout"].items() if limit is not None}
    request.extensions["timeout"] = limits | named


def timeout_or(default: float) -> float:
    """The maximum time between two bytes of a response, in seconds: $SMOLCTL_HUB_TIMEOUT, or else `default`.

    Raises:
        InputError: $SMOLCTL_HUB_TIMEOUT is not a number.
    """
    named = os.environ.get(TIMEOUT_VARIABLE)
    try:
        seconds = float(named) if named else default
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"{TIMEOUT_VARIABLE}={named}: not a number of seconds", "Set it to 60, or unset it.")
    return seconds


def read_timeout() -> float:
    """The time limit of a short request, in seconds; its default is the client's own $HF_HUB_ETAG_TIMEOUT."""
    from huggingface_hub import constants

    return timeout_or(constants.HF_HUB_ETAG_TIMEOUT)


@contextmanager
def choosing_transfer(
    xet_token: str, token: bool | str | None, note: Callable[[str], None]
) -> Iterator[None]:
    """Choose a transfer method for large files that this Hub supports.

    The client uses Xet if its package is installed, and retries for over a minute if the Hub does not have
    Xet. For a Hub that answers 404 to a request for Xet's token, Git LFS is used instead.

    Args:
        xet_token: the address of that request.
        token: as of `api`.
        note: called with a sentence if files are not sent in the usual way.

    Raises:
        HTTPError: the Hub does not respond; `explained` converts it to `HubError`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers(token=token)
    if (
        constants.HF_HUB_DISABLE_XET
        or session().get(xet_token, headers=headers, timeout=read_timeout()).status_code != 404
    ):
        yield
        return
    note(f"{endpoint()} has no Xet: large files go through Git LFS.")
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = False


@dataclass(frozen=True)
class Fetched:
    """The answer to a GET."""

    content: bytes
    size: int  # of the whole file; 0 if the Hub does not report it
    downloaded: int  # bytes over the network


def fetch(url: str, limit: int, start: int | None = None, token: bool | str | None = None) -> Fetched:
    """Make one GET without retries; reads no more than needed even if the server ignores Range.

    Args:
        url: at the Hub.
        limit: maximum bytes to read.
        start: first byte, requested with Range; None requests the whole file.
        token: as of `api`.

    Raises:
        HTTPError, OSError: `explained` converts them to `HubError`.
    """
    from huggingface_hub import hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers(token=token) | {"accept-encoding": "identity"}
    if start is not None:
        headers["range"] = f"bytes={start}-{start + limit - 1}"
    with session().stream("GET", url, headers=headers, timeout=read_timeout()) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        skip = 0 if start is None or response.status_code == 206 else start
        content = bytearray()
        for piece in response.iter_raw():
            content += piece
            if len(content) >= skip + limit:
                break
        # The size of a part is its length; Content-Range may give "*" for the size of the whole file.
        is_part = response.status_code == 206
        whole = response.headers.get("content-range" if is_part else "content-length", "").rpartition("/")[2]
        size = int(whole) if whole.isdecimal() else 0
        return Fetched(bytes(content[skip : skip + limit]), size, response.num_bytes_downloaded)
