"""Turns every error of the Hub and its client into one line of cause and one line of remedy.

Reading a model, reading a dataset and writing share the table; their remedies differ (`Purpose`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from smolctl.errors import HubError, InputError, SmolError
from smolctl.hub.connection import TIMEOUT_VARIABLE, endpoint

# Tokens, and user and password in a URL.
_SECRETS = re.compile(r"\b(?:hf|api_org)_(?:oauth_)?[A-Za-z0-9.-]{8,}|(?<=://)[^/@\s]+(?=@)")


class TemporaryError(HubError):
    """A temporary failure: the Hub is overloaded or out of order, or the connection broke."""

    wait_s: float | None = None  # as specified by the Hub


class MissingError(HubError):
    """There is no such repository, revision or file, or the token may not see it."""


class ChangedError(HubError):
    """Somebody else has committed since the head was read."""


class PaymentError(HubError):
    """The account's plan does not cover it (402), or its rights do not (403)."""


@dataclass(frozen=True)
class Purpose:
    """The purpose of a request, which determines the remedies."""

    right: str  # permission that a token needs: read or write
    offline: str  # alternative without the Hub
    besides: str = ""  # other places that were searched for a name
    elsewhere: str = ""  # remedy for missing permissions
    kept: str = ""  # what a failure does not affect


READING = Purpose("read", "name a local file or folder", ", and no local file or folder")
READING_DATA = Purpose("read", "use --data python or local files", READING.besides)
WRITING = Purpose(
    "write",
    "use --dry-run or --local-dir",
    elsewhere=", or name another --repo",
    kept=" Files that have arrived are not sent again.",
)
Verdict = tuple[type[HubError], str, str]  # cause and remedy
LOGIN = "Run `hf auth login`, or set HF_TOKEN to a token that may {right}"
AGAIN = "Try again in a few minutes.{kept}"
_LATE: Verdict = (
    TemporaryError,
    "{host} did not answer in time",
    f"{AGAIN} {TIMEOUT_VARIABLE}=S waits S seconds.",
)
_CUT_OFF: Verdict = (
    TemporaryError,
    "{host} cannot be reached ({said})",
    "Check the network, HF_ENDPOINT and proxies; or {offline}.{kept}",
)
_MISSING: Verdict = (
    MissingError,
    "not on the Hub, or private{besides} ({status})",
    f"Check the name. If it is private: {LOGIN} it.",
)
# Raised by the client if a response does not come from a Hub.
STRANGE = (LookupError, TypeError, AttributeError, AssertionError)
_STRANGE: Verdict = (
    HubError,
    "{host} did not answer like a Hub ({said})",
    "Is {host} a Hub? HF_ENDPOINT says where yours is.",
)
# Exceptions by class name; other responses by status.
TABLE: Mapping[str | int, Verdict] = {
    "OfflineModeIsEnabled": (HubError, "HF_HUB_OFFLINE is set", "Unset it, or {offline}."),
    "LocalTokenNotFoundError": (HubError, "no Hugging Face token was found", f"{LOGIN}."),
    "TimeoutException": _LATE,
    "TimeoutError": _LATE,
    "HTTPError": _CUT_OFF,
    "ConnectionError": _CUT_OFF,
    "InvalidURL": (HubError, "no URL can be made of it ({said})", "Check HF_ENDPOINT and the name."),
    **dict.fromkeys((kind.__name__ for kind in STRANGE), _STRANGE),
    "GatedRepoError": (
        HubError,
        "gated: its authors ask you to accept their terms first",
        "Accept its license at {page}, then set HF_TOKEN; with a token, wait until they grant you access.",
    ),
    "RevisionNotFoundError": (
        MissingError,
        "no such revision",
        "See its branches and commits at {page}/commits, or leave the revision out.",
    ),
    "RemoteEntryNotFoundError": (
        MissingError,
        "a file is missing ({at})",
        "See its files at {page}/tree/main.",
    ),
    "DisabledRepoError": (HubError, "the Hub has disabled this repository", "See {page}."),
    "RepositoryNotFoundError": _MISSING,
    404: _MISSING,
    400: (HubError, "the Hub refuses it ({said})", "Correct the field that it names."),
    401: (HubError, "the Hub does not accept the token (401)", f"{LOGIN}."),
    402: (PaymentError, "the account's plan does not cover it (402)", "{said}"),
    403: (
        PaymentError,
        "permission denied (403: {said})",
        "Give the token {right} access to it (hf.co/settings/tokens){elsewhere}.",
    ),
    429: (
        TemporaryError,
        "too many requests (429)",
        f"{AGAIN} With a token (`hf auth login`) the limit is higher.",
    ),
    500: (TemporaryError, "{host} has an internal error ({status})", AGAIN),
    409: (
        HubError,
        "it conflicts with what already exists there (409: {said})",
        "Look at {page}, and remove what is there{elsewhere}.",
    ),
    412: (
        ChangedError,
        "somebody else committed meanwhile, so nothing was changed (412)",
        "Look at their commit at {page}/commits, then run the same command again: "
        "your push is then made on top of it.",
    ),
    413: (HubError, "too large for the Hub (413)", "Leave out a file, see hf.co/docs."),
}
OTHERWISE: Verdict = (HubError, "{host} answers {status} ({said})", "See {page}.")


@contextmanager
def answered() -> Iterator[None]:
    """Parse a response of the Hub with a schema; an invalid response is the server's fault.

    Raises:
        HubError: instead of every `InputError`.
    """
    try:
        yield
    except InputError as error:
        raise HubError(error.message, f"Is {endpoint()} a Hub? HF_ENDPOINT says where yours is.") from None


@contextmanager
def explained(
    name: str,
    purpose: Purpose,
    doing: str = "",
    path: str | None = None,
    wrappers: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Convert the client's exceptions to `HubError`.

    Args:
        name: the repository, or the Hub itself.
        purpose: reading or writing.
        doing: the action, as in "cannot {doing}".
        path: of the repository's page on the Hub; None if it is the name.
        wrappers: exceptions of other libraries in which those of the client may be wrapped.

    Raises:
        HubError: with cause and remedy, without tokens. After a `TemporaryError`, a retry may succeed.
    """
    import httpx2

    of_requests = (httpx2.HTTPError, httpx2.InvalidURL)
    caught: tuple[type[Exception], ...] = (*of_requests, OSError, RuntimeError, ValueError, *wrappers)
    try:
        yield
    except SmolError:
        raise
    except caught as error:
        (kind, cause, remedy), link = _verdict(error)
        answer = getattr(link, "response", None)
        facts = vars(purpose) | {
            "page": f"{endpoint()}/{name if path is None else path}".rstrip("/"),
            "host": endpoint(),
            "said": first_line(link),
            "status": getattr(answer, "status_code", 0),
            "at": getattr(getattr(answer, "url", None), "path", ""),
        }
        lead = f"{name}: cannot {doing}: " if doing else f"{name}: "
        explanation = kind(
            _without_secrets(lead + cause.format(**facts)), _without_secrets(remedy.format(**facts))
        )
        wait = getattr(answer, "headers", {}).get("Retry-After", "")
        if isinstance(explanation, TemporaryError) and wait.isdecimal():
            explanation.wait_s = float(wait)
        raise explanation from None


def _verdict(error: BaseException) -> tuple[Verdict, BaseException]:
    """The table's entry for an exception, and the exception in its chain of causes to which the entry
    applies.
    """
    from huggingface_hub.errors import HfHubHTTPError

    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for link in sorted(chain, key=lambda link: not isinstance(link, HfHubHTTPError)):  # responses first
        for kind in type(link).__mro__:
            if kind.__name__ in TABLE:
                return TABLE[kind.__name__], link
            if isinstance(link, HfHubHTTPError) and kind is HfHubHTTPError:
                status = link.response.status_code
                return TABLE.get(500 if status == 408 or status >= 500 else status, OTHERWISE), link
    if isinstance(error, OSError) and error.errno is not None:
        return (HubError, "{said}", "Check the disk and the rights of its files."), error
    if isinstance(error, (RuntimeError, OSError)):  # the client wraps failed transfers in these
        return (TemporaryError, "{said}", AGAIN), error
    return (HubError, "{said}", "Correct the field that it names, or {offline}."), error


def first_line(error: BaseException) -> str:
    """The server's own message if there is one, else the exception's first line; without secrets."""
    text = str(getattr(error, "server_message", None) or error).strip()
    return _without_secrets(text.splitlines()[0][:300] if text else type(error).__name__)


def _without_secrets(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return _SECRETS.sub("…", text.replace(token, "…") if token and len(token) >= 8 else text)
