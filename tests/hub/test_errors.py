"""What the Hub refuses is explained alike to who reads a model, reads a dataset, or writes."""

from __future__ import annotations

import builtins
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants, errors, set_client_factory

from smolctl.data.text.hub import DatasetName
from smolctl.errors import ExitCode, HubError, InputError
from smolctl.hub.client import HubClient, Target
from smolctl.hub.connection import session
from smolctl.hub.errors import (
    READING,
    TABLE,
    WRITING,
    ChangedError,
    MissingError,
    PaymentError,
    TemporaryError,
    explained,
)
from smolctl.sources import open_source
from tests.support.hub_server import HubRepository, HubServer

TOKEN = "hf_goodtoken"
WAYS: dict[str, Callable[[], object]] = {
    "reading": lambda: open_source("org/tiny"),
    "datasets": lambda: DatasetName("org/tiny").pinned(),
    "writing": lambda: HubClient(print, wait=lambda _s: None).head(Target("org/tiny")),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def refused(way: str) -> HubError:
    """The error of one way to use the Hub, after what holds for every one of them."""
    with pytest.raises(HubError) as caught:
        WAYS[way]()
    error = caught.value
    assert error.exit_code == ExitCode.HUB
    assert error.message.startswith("org/tiny: ")
    assert error.hint
    assert "\n" not in error.message + error.hint
    assert TOKEN not in error.message + error.hint
    return error


ANSWERS: dict[str, tuple[int, str, str, type[HubError], str, str]] = {
    "bad request": (400, "", "sha is odd", HubError, "the Hub refuses it (sha is odd)", "Correct"),
    "no repository": (404, "RepoNotFound", "", MissingError, "not on the Hub, or private", "hf auth login"),
    "no page": (404, "", "", MissingError, "not on the Hub, or private", "Check the name"),
    "private": (401, "RepoNotFound", "", MissingError, "not on the Hub, or private", "HF_TOKEN"),
    "bad token": (
        401,
        "",
        "Invalid credentials in Authorization header",
        HubError,
        "does not accept the token (401)",
        "hf auth login",
    ),
    "gated": (403, "GatedRepo", "", HubError, "gated", "Accept its license at"),
    "disabled": (403, "", "Access to this resource is disabled.", HubError, "disabled", "See http"),
    "no revision": (404, "RevisionNotFound", "", MissingError, "no such revision", "/commits"),
    "no file": (404, "EntryNotFound", "", MissingError, "a file is missing (/api/", "/tree/main"),
    "unpaid": (402, "", "buy PRO", PaymentError, "plan does not cover it (402)", "buy PRO"),
    "forbidden": (403, "", "read-only", PaymentError, "permission denied (403: read-only)", "access to it"),
    "conflict": (
        409,
        "",
        "busy",
        HubError,
        "conflicts with what already exists there (409: busy)",
        "Look at",
    ),
    "somebody else": (412, "", "", ChangedError, "somebody else committed", "same command again"),
    "too large": (413, "", "", HubError, "too large for the Hub (413)", "Leave out"),
    "too many": (429, "", "", TemporaryError, "too many requests (429)", "in a few minutes"),
    "slow": (408, "", "", TemporaryError, "an internal error (408)", "in a few minutes"),
    "broken": (500, "", "", TemporaryError, "an internal error (500)", "in a few minutes"),
    "overloaded": (503, "", "", TemporaryError, "an internal error (503)", "in a few minutes"),
    "another": (418, "", "short and stout", HubError, "answers 418 (short and stout)", "See http"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_means_the_same_to_reading_datasets_and_writing(
    kind: str, way: str, hub: HubServer
) -> None:
    hub.fails_with, hub.error_code, hub.error_message, expected, cause, remedy = ANSWERS[kind]
    error = refused(way)
    assert type(error) is expected
    assert cause in error.message
    assert remedy in error.hint


@pytest.mark.parametrize("way", WAYS)
def test_no_answer_in_time(way: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLCTL_HUB_TIMEOUT", "0.2")
    hub.hangs_for = 1
    error = refused(way)
    assert type(error) is TemporaryError
    assert f"{hub.url} did not answer in time" in error.message
    assert "SMOLCTL_HUB_TIMEOUT" in error.hint


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", [0, 140], ids=["headers", "body"])
def test_an_answer_that_drips_is_not_waited_for(
    start: int, way: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte comes in time, and the whole would take minutes."""
    monkeypatch.setenv("SMOLCTL_HUB_TIMEOUT", "0.05")
    hub.drips, hub.drips_from = 0.02, start
    hub.repositories["org/tiny"] = HubRepository({f"{number}.txt": b"" for number in range(200)})
    error = refused(way)
    assert type(error) is TemporaryError
    assert f"{hub.url} did not answer in time" in error.message


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_connection(way: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        error = refused(way)
    assert type(error) is TemporaryError
    assert f"{address} cannot be reached" in error.message
    assert "HF_ENDPOINT" in error.hint


@pytest.mark.parametrize("way", WAYS)
def test_offline(way: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(way)
    assert "HF_HUB_OFFLINE is set" in error.message
    assert "nset" in error.hint
    assert hub.log == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("said", [f"token {TOKEN}", "token hf_" + "aB3" * 11, "http://me:hunter2@proxy/"])
def test_a_secret_that_the_server_repeats_is_not_shown(said: str, way: str, hub: HubServer) -> None:
    for hub.fails_with in (402, 403, 409, 418):
        hub.error_message = said
        error = refused(way)
        assert "…" in error.message + error.hint
        assert not any(part in error.message + error.hint for part in ("aB3aB3", "hunter2"))


def test_a_wait_that_the_hub_asks_for_is_known_however_deep_its_answer_lies() -> None:
    request = httpx2.Request("GET", "http://hub/")
    answer = httpx2.Response(429, headers={"Retry-After": "7"}, request=request)
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = errors.HfHubHTTPError("no", response=answer)
    with pytest.raises(TemporaryError) as caught, explained("org/tiny", WRITING, "send the files"):
        raise wrapped
    assert caught.value.wait_s == 7
    assert "too many requests (429)" in caught.value.message


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(28, "No space left on device"), HubError, "No space left"),
        (RuntimeError("transfer broke"), TemporaryError, "transfer broke"),
        (ConnectionError("xet: network"), TemporaryError, "cannot be reached (xet: network)"),
        (TimeoutError(), TemporaryError, "did not answer in time"),
        (ValueError("bad name {x}"), HubError, "bad name {x}"),
        (errors.LocalTokenNotFoundError("no"), HubError, "no Hugging Face token was found"),
    ],
)
def test_what_the_client_raises_without_an_answer(error: Exception, kind: type[HubError], words: str) -> None:
    with pytest.raises(kind, match=r"cannot make \{it\}: ") as caught, explained("x", READING, "make {it}"):
        raise error
    assert type(caught.value) is kind
    assert words in caught.value.message


def test_every_exception_of_the_table_exists() -> None:
    for name in (name for name in TABLE if isinstance(name, str)):
        assert any(hasattr(module, name) for module in (errors, httpx2, builtins)), name


def test_the_session_of_another_program_keeps_its_own_limit(hub: HubServer) -> None:
    theirs = httpx2.Client(timeout=3, headers={"x-from": "them"}, follow_redirects=True)
    ours = session()
    hooks = ours.event_hooks
    set_client_factory(lambda: theirs)
    try:
        assert session() is theirs
        assert theirs.timeout == httpx2.Timeout(3)
    finally:
        set_client_factory(lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=None))
    assert session().event_hooks["request"] == hooks["request"]


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_limit_that_is_none_is_named(
    value: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOLCTL_HUB_TIMEOUT", value)
    with pytest.raises(InputError, match=f"SMOLCTL_HUB_TIMEOUT={value}: not a number of seconds"):
        open_source("org/tiny")


@pytest.mark.parametrize("way", ["reading", "writing"])
@pytest.mark.parametrize(
    "address", ["http://[", "http://a:99999999", "http://a\x7f", "http://" + "a" * 70_000]
)
def test_an_address_that_is_none_is_named(
    way: str, address: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    refused(way)
