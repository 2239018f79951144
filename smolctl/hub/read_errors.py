"""What the Hub's client raises, as one line of cause and one of remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from smolctl.errors import HubError, SmolError

LOGIN = "Set HF_TOKEN or run `hf auth login`"


class UnreachableError(HubError):
    """The Hub is gone or out of order; the cache may still have what is asked for."""


@contextmanager
def explained(name: str, url: str) -> Iterator[None]:
    """Turn the client's exceptions into `HubError`.

    Args:
        name: the repository.
        url: its page.

    Raises:
        HubError: whatever went wrong; an `UnreachableError` where the cache may help.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except SmolError:
        raise
    except OfflineModeIsEnabled:
        raise HubError(
            f"{name}: HF_HUB_OFFLINE is set", "Unset it, or name a local file or folder."
        ) from None
    except HfHubHTTPError as error:
        raise _refusal(error, name, url) from None
    except httpx2.TimeoutException:
        raise UnreachableError(
            f"{name}: no answer from {_host(url)} in time",
            "Try again, or raise HF_HUB_ETAG_TIMEOUT (seconds).",
        ) from None
    except (httpx2.HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise UnreachableError(
            f"{name}: {_host(url)} cannot be reached ({_first_line(error)})",
            "Check the network, HF_ENDPOINT and proxies; or name a local file or folder.",
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise HubError(f"{name}: {_first_line(error)}", "Check the name, the disk, and try again.") from None


def _refusal(error: Exception, name: str, url: str) -> HubError:
    """An answer that says no."""
    from huggingface_hub import errors, get_token

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    has_token = get_token() is not None
    if isinstance(error, errors.GatedRepoError):
        then = "wait until its authors have let you in" if has_token else "set HF_TOKEN"
        return HubError(
            f"{name}: gated: its authors ask for consent first", f"Accept its licence at {url}, then {then}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{name}: no such revision", f"See its branches and commits at {url}/commits.")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubError(f"{name}: a file of the model is missing", f"See its files at {url}/tree/main.")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        remedy = (
            "Check the name, and that the token may read it."
            if has_token
            else f"Check the name; if it is private: {LOGIN}."
        )
        return HubError(f"{name}: not on the Hub, or private; and no local file or folder", remedy)
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{name}: the Hub has disabled this repository", f"See {url}.")
    if status == 401:
        return HubError(
            f"{name}: the Hub does not accept the token (401)",
            f"{LOGIN} with a valid one, or unset HF_TOKEN.",
        )
    if status == 403:
        return HubError(
            f"{name}: the token may not read this (403)", "Give the token read access to the repository."
        )
    if status == 429:
        return HubError(
            f"{name}: too many requests (429)", f"Wait a few minutes. {LOGIN} for a higher limit."
        )
    if status >= 500:
        cause = f"{name}: {_host(url)} has a problem of its own ({status})"
        return UnreachableError(cause, "Try again in a few minutes.")
    return HubError(f"{name}: {_host(url)} answers {status or _first_line(error)}", f"See {url}.")


def _host(url: str) -> str:
    return "/".join(url.split("/")[:3])


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
