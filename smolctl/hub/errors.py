"""What the Hub answers to somebody who wants to write, as one line of cause and one of remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from smolctl.errors import HubError, SmolError

LOGIN = "Run `hf auth login`, or set HF_TOKEN to a token that may write."
AGAIN = "Run the same command again: what has arrived is not sent twice."
_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{8,}")


class PassingError(HubError):
    """The Hub may do it in a moment: too busy, out of order, or the connection broke."""

    def __init__(self, message: str, hint: str = AGAIN, wait_s: float | None = None) -> None:
        super().__init__(message, hint)
        self.wait_s = wait_s  # as the Hub asks for


class MissingError(HubError):
    """There is no such repository, or the token may not see it."""


class ChangedError(HubError):
    """Somebody else has committed since we looked."""


class PaymentError(HubError):
    """The account's plan does not cover it (402), or its rights do not (403)."""


@contextmanager
def explained(name: str, doing: str) -> Iterator[None]:
    """Turn the client's exceptions into `HubError`.

    Args:
        name: the repository, or the Hub itself.
        doing: what was tried, as in "cannot {doing}".

    Raises:
        HubError: with cause and remedy; never with a token in it.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except SmolError:
        raise
    except OfflineModeIsEnabled:
        raise HubError(
            f"{name}: HF_HUB_OFFLINE is set", "Unset it; --dry-run and --local-dir need no network."
        ) from None
    except LocalTokenNotFoundError:
        raise no_token() from None
    except HfHubHTTPError as error:
        raise refusal(error, name, doing) from None
    except httpx2.TimeoutException:
        raise PassingError(f"{name}: cannot {doing}: the Hub did not answer in time") from None
    except (httpx2.HTTPError, ConnectionError) as error:
        raise PassingError(
            f"{name}: cannot {doing}: the connection failed ({first_line(error)})",
            f"Check the network, HF_ENDPOINT and proxies. {AGAIN}",
        ) from None
    except ValueError as error:
        raise HubError(
            f"{name}: cannot {doing}: the Hub refuses it ({first_line(error)})", "Mend what it names."
        ) from None
    except (OSError, RuntimeError) as error:  # the client wraps failed uploads in these
        cause = error.__cause__ or error.__context__
        if isinstance(cause, HfHubHTTPError):
            raise refusal(cause, name, doing) from None
        raise PassingError(f"{name}: cannot {doing} ({first_line(error)})") from None


def no_token() -> HubError:
    return HubError("no Hugging Face token was found", LOGIN)


def refusal(error: Exception, name: str, doing: str) -> HubError:
    """An answer that says no."""
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    said = first_line(error)
    if isinstance(error, errors.RevisionNotFoundError):
        return MissingError(
            f"{name}: no such revision", "Name a branch that exists, or leave out --revision."
        )
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{name}: gated: its authors ask for consent first",
            "Accept its terms on its page, then try again.",
        )
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return HubError(f"{name}: the Hub does not accept the token (401)", LOGIN)
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return MissingError(
            f"{name}: cannot {doing}: not on the Hub, or this token may not see it (404)",
            "Check the name and the token's rights.",
        )
    if status == 402:
        return PaymentError(f"{name}: cannot {doing}: the account's plan does not cover it (402)", said)
    if status == 403:
        return PaymentError(
            f"{name}: cannot {doing}: the token may not do this (403: {said})",
            "Give the token write access to this namespace (hf.co/settings/tokens), or name another --repo.",
        )
    if status == 409:
        return HubError(
            f"{name}: cannot {doing}: there is something of that name already (409: {said})",
            "Choose another --repo, or remove what is there.",
        )
    if status == 412:
        return ChangedError(
            f"{name}: somebody else committed while this was being sent (412); nothing of yours is in",
            "Look at their commit, then run the same command again: it goes on top of it.",
        )
    if status == 413:
        return HubError(
            f"{name}: cannot {doing}: too large for the Hub (413)", "Leave out a file, see hf.co/docs."
        )
    if status == 429:
        return PassingError(
            f"{name}: too many requests (429)", f"Wait a few minutes. {AGAIN}", _retry_after(response)
        )
    if status >= 500:
        return PassingError(
            f"{name}: cannot {doing}: the Hub has a problem of its own ({status})",
            AGAIN,
            _retry_after(response),
        )
    return HubError(f"{name}: cannot {doing}: the Hub answers {status or said}", said if status else AGAIN)


def _retry_after(response: object) -> float | None:
    value = getattr(response, "headers", {}).get("Retry-After", "")
    return float(value) if value.isdecimal() else None


def first_line(error: BaseException) -> str:
    """The server's own words where there are any, else the exception's first line; without tokens."""
    text = str(getattr(error, "server_message", None) or error).strip()
    line = text.splitlines()[0][:300] if text else type(error).__name__
    return _TOKEN.sub(r"\1_…", line)
