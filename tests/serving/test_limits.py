"""Who may ask and how much, and what a client costs that leaves, waits, or asks for too much."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from smolctl.data.tokenizer.chatml import CHATML
from smolctl.errors import SmolError, UsageError
from smolctl.generation.scheduler import CHUNK
from smolctl.serving.guards import Limits
from smolctl.serving.serve import ServeOptions, listen
from tests.support.processes import Smolctl, start
from tests.support.serving import PATIENCE_S, Served, serving
from tests.support.tiny_models import write_folder

CONTEXT = 40 * CHUNK
SHORT = {"prompt": "the cat", "max_tokens": 5, "temperature": 0}
ENDLESS = {"prompt": "the cat", "max_tokens": CONTEXT, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limits") / "tiny"
    return write_folder(folder, template=CHATML, context=CONTEXT, eos_token_id=None)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    """One slot, and two may wait."""
    limits = Limits(waiting=2, body_bytes=100_000)
    with serving(model, slots=1, context=CONTEXT, limits=limits) as server, endless(server):
        yield server


@contextmanager
def endless(served: Served) -> Iterator[None]:
    """The model does not end its answers by itself, and takes a millisecond or two for each call."""
    service = served.server.service
    engine, forward = service.model.engine, service.model.engine.forward

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.001)
        return forward(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "forward", slow)
        patch.setattr(service, "_ends", frozenset())
        yield


def send(served: Served, body: dict[str, object], receive_bytes: int | None = None) -> socket.socket:
    """A connection over which a request was sent; it holds so many bytes of an answer that nobody reads."""
    content = json.dumps(body).encode()
    host = served.url.removeprefix("http://")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(PATIENCE_S)
    connection.connect(("127.0.0.1", int(host.rpartition(":")[2])))
    connection.sendall(head.encode() + content)
    return connection


def wait_until(served: Served, active: int, waiting: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (served.metric("answers_active"), served.metric("answers_waiting")) != (active, waiting):
        assert time.monotonic() < deadline


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["waiting", "reading", "decoding"])
def test_a_client_that_leaves_costs_nothing_more(served: Served, when: str, stream: bool) -> None:
    expected = served.post("completions", **SHORT).json()["choices"]
    long = {"prompt": [5, 6, 7, 8, 9] * (CONTEXT // 5 - 5)} if when == "reading" else {}
    first = send(served, {**ENDLESS, "stream": stream, **long})
    wait_until(served, 1, 0)
    leaving = first
    if when == "waiting":
        leaving = send(served, {**ENDLESS, "stream": stream})
        wait_until(served, 1, 1)
    generated = served.metric("generated_tokens")
    leaving.close()
    wait_until(served, int(when == "waiting"), 0)
    first.close()
    assert served.post("completions", **SHORT).json()["choices"] == expected
    assert served.metric("generated_tokens") - generated < CONTEXT / 2


def test_more_than_may_wait_are_told_to_come_back(served: Served) -> None:
    streams = [send(served, ENDLESS) for _ in range(3)]
    wait_until(served, 1, 2)
    answer = served.post("completions", **SHORT)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["type"] == "overloaded_error"
    for stream in streams:
        stream.close()
    wait_until(served, 0, 0)
    assert served.post("completions", **SHORT).status_code == 200


def test_more_answers_than_can_ever_wait_are_not_told_to_come_back(served: Served) -> None:
    for more in ({"n": 4}, {"prompt": ["a", "b"], "n": 2}):
        answer = served.post("completions", **{**SHORT, **more})
        assert answer.status_code == 400
        assert "4 answers" in answer.json()["error"]["message"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_large_body_is_refused_while_it_is_read(served: Served, announced: bool) -> None:
    content = b" " * 200_000
    pieces = content if announced else iter([content[:150_000], content[150_000:]])
    answer = served.client.post("/v1/completions", content=pieces)
    assert answer.status_code == 413
    assert "100,000" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long_ends_with_an_error(model: Path, stream: bool) -> None:
    with serving(model, context=CONTEXT, limits=Limits(answer_s=0.05)) as served, endless(served):
        answer = served.post("completions", **{**ENDLESS, "stream": stream})
        assert answer.status_code == (200 if stream else 504)
        last = answer.text.strip().rpartition("data: ")[2]
        assert "0.05 seconds" in json.loads(last)["error"]["message"]
        wait_until(served, 0, 0)


@pytest.mark.parametrize("ends", ["its time", pytest.param("the system's patience", marks=pytest.mark.slow)])
def test_a_client_that_reads_nothing_is_let_go(
    model: Path, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(connections=1, answer_s=0.3, farewell_s=0.1)
    if ends == "the system's patience":
        if not hasattr(socket, "TCP_USER_TIMEOUT"):
            pytest.skip("only Linux drops such clients")
        limits = Limits(connections=1)
        monkeypatch.setattr("smolctl.serving.serve.UNREAD_S", 0.3)
    unread = {**ENDLESS, "n": 4, "logprobs": 20}
    with (
        serving(model, context=CONTEXT, limits=limits, send_bytes=1 << 12) as served,
        endless(served),
        send(served, unread, receive_bytes=1 << 12),
    ):
        deadline = time.monotonic() + PATIENCE_S
        for status in (200, 503):  # until it has begun, and until it is over
            while served.client.get("/health").status_code == status:
                assert time.monotonic() < deadline


def test_a_silent_stream_gets_comments(model: Path) -> None:
    with serving(model, slots=1, context=CONTEXT, limits=Limits(ping_s=0.01)) as served, endless(served):
        first = send(served, ENDLESS)
        wait_until(served, 1, 0)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(served.post, "completions", **SHORT, stream=True)
            wait_until(served, 1, 1)
            time.sleep(0.05)
            first.close()
            text = waiting.result().text
    assert text.startswith(": ")
    assert text.endswith("data: [DONE]\n\n")


def test_only_its_own_names_and_pages_are_answered(served: Served) -> None:
    port = served.url.rpartition(":")[2]
    fine = [{}, {"host": f"localhost:{port}"}, {"origin": served.url}, {"host": "LOCALHOST"}]
    strange = [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}]
    strange += [{"host": "127.0.0.1.evil.example"}, {"host": "localhost.evil.example:80"}]
    for status, many in ((200, fine), (403, strange)):
        for headers in many:
            answer = served.client.get("/v1/models", headers=headers)
            assert answer.status_code == status
            assert "access-control-allow-origin" not in answer.headers


def test_a_key_is_asked_for_where_there_is_one(model: Path) -> None:
    with serving(model, api_key="geheim ü") as served:
        for given in (None, "Bearer", "Bearer wrong", "Basic geheim ü", "Bearer geheim"):
            headers = {} if given is None else {b"authorization": given.encode()}
            answer = served.client.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        asked = served.client.options("/v1/models")  # a browser's question, which has no key
        assert asked.status_code == 405
        assert "access-control-allow-origin" not in asked.headers
        key = {b"authorization": "Bearer geheim ü".encode(), b"host": b"my.server"}
        assert served.client.get("/v1/models", headers=key).status_code == 200
        assert served.client.get("/health").status_code == 200


def test_a_used_port_is_one_line() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        first.listen()
        with pytest.raises(SmolError, match=f"127.0.0.1:{port}"):
            listen("127.0.0.1", port)


def test_other_machines_come_in_with_a_key_or_by_an_explicit_yes(smolctl: Smolctl) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        done = smolctl("serve", "nothing", "--host", host)
        assert done.code == 2
        assert "--api-key" in done.err


@pytest.mark.parametrize("key", ["", " ", "secret\n", " secret", "sec\x00ret"])
def test_a_key_that_no_client_can_send_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="--api-key is empty, or has"):
        ServeOptions(api_key=key)


def test_an_unforeseen_error_ends_what_runs_and_nothing_after_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model) as served:
        expected = served.post("completions", **SHORT).json()["choices"]
        engine = served.server.service.model.engine
        with monkeypatch.context() as patch:
            patch.setattr(engine, "forward", lambda *_arguments, **_options: 1 / 0)
            answer = served.post("completions", **SHORT)
        assert answer.status_code == 500
        assert "ZeroDivisionError" in answer.json()["error"]["message"]
        assert served.post("completions", **SHORT).json()["choices"] == expected


def test_a_connection_that_sends_nothing_holds_up_nobody(model: Path) -> None:
    with serving(model, limits=Limits(body_s=0.05)) as served:
        host = ("127.0.0.1", int(served.url.rpartition(":")[2]))
        with socket.create_connection(host, PATIENCE_S) as silent:
            silent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            assert served.post("completions", **SHORT).status_code == 200
            assert silent.recv(100).startswith(b"HTTP/1.1 408 ")


def test_requests_under_way_are_bounded(model: Path) -> None:
    with serving(model, context=CONTEXT, limits=Limits(connections=1)) as served, endless(served):
        stream = send(served, ENDLESS)
        answer = httpx.Response(200)
        while answer.status_code == 200:  # until the stream has begun
            answer = served.client.get("/health")
        assert answer.status_code == 503
        stream.close()


@pytest.mark.slow
@pytest.mark.real_weights
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_answers_end_with_an_error_where_the_server_is_stopped_at_once(
    number: signal.Signals, code: int, gguf_file: Path
) -> None:
    process = start("serve", gguf_file, "--port", 0)
    assert process.stdout is not None
    url = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.:]+", line)))
    body = {"prompt": "Once upon a time", "max_tokens": 2_000, "temperature": 1.5, "n": 8, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(number)  # after which answers have half a minute
        time.sleep(1)
        process.send_signal(number)
        *_, last = filter(None, lines)
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "The server is being stopped."
    assert "Traceback" not in process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == code
