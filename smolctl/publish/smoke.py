"""Starts a Space's folder on this machine, checks the answer to one prompt, and stops it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from smolctl.errors import SmolError
from smolctl.extras import missing_package
from smolctl.hub.errors import first_line
from smolctl.programs import running_program
from smolctl.publish.app import SpaceFacts
from smolctl.publish.space_endpoints import CONTROLS

START_SECONDS = 600.0  # imports from a cold disk on a busy machine; an app that exits is detected immediately
TIMEOUT_S = 300.0
LOG_LINES = 15


@dataclass(frozen=True)
class SmokeTest:
    """The result of the test."""

    prompt: str
    text: str
    start_s: float  # until the page was ready
    answer_s: float
    engine: str  # the app's description


def require_gradio() -> None:
    """Check that Gradio is installed.

    Raises:
        MissingPackageError: it is not.
    """
    if importlib.util.find_spec("gradio") is None or importlib.util.find_spec("gradio_client") is None:
        raise missing_package("gradio", "space", "testing the Space")


def smoke_test(folder: Path, python: str = sys.executable) -> SmokeTest:
    """Start the folder like the Hub, send one prompt through its API, and stop it.

    Args:
        folder: of the Space.
        python: the interpreter; its environment must have the Space's requirements and Gradio.

    Raises:
        SmolError: it does not start, fails, or does not answer; with the end of its log.
    """
    require_gradio()
    started = time.perf_counter()
    with running(folder, python) as url:
        start_s = time.perf_counter() - started
        return _ask(url, SpaceFacts.read(folder), start_s)


@contextlib.contextmanager
def running(folder: Path, python: str = sys.executable) -> Iterator[str]:
    """Run the app of a folder on a port of this machine during the block; yields its address.

    Raises:
        SmolError: it does not start, with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = {
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONSAFEPATH": "",
    }
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        running_program([python, "app.py"], log, settings, folder) as process,
    ):
        _wait_until_up(process, port, log)
        yield f"http://127.0.0.1:{port}"


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: IO[str]) -> None:
    import httpx2

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _failed(f"the Space's app ended with code {process.returncode}", log)
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/", timeout=5, trust_env=False).is_success:
                return
        except httpx2.HTTPError:
            time.sleep(0.2)
    raise _failed(f"the Space's app did not start within {START_SECONDS:.0f} s", log)


def _failed(what: str, log: IO[str]) -> SmolError:
    log.seek(0)
    lines = [line for line in log.read().splitlines() if line.strip()][-LOG_LINES:]
    return SmolError(what, "Nothing of the Space was sent. The end of its log:\n" + "\n".join(lines))


def _ask(url: str, facts: SpaceFacts, start_s: float) -> SmokeTest:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the argument alone does not switch it off
    from gradio_client import Client

    prompt = facts.examples[0] if facts.examples else "Hello"
    values = [control[4] for control in CONTROLS]
    values[0], values[-1] = 16, 1  # few tokens are enough, and temperature 0 gives the same ones every time
    try:
        client = Client(url, verbose=False, analytics_enabled=False)
        named = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
        endpoint = "/chat" if "/chat" in named else "/continue"
        asked = time.perf_counter()
        text = str(client.submit(prompt, *values, api_name=endpoint).result(timeout=TIMEOUT_S))
        answer_s = time.perf_counter() - asked
        engine = str(client.predict(api_name="/engine"))
    except Exception as error:  # whatever the client raises, the Space does not answer
        raise SmolError(
            f"the Space's app does not answer ({first_line(error)})", "Nothing of the Space was sent."
        ) from None
    if not text.strip():
        raise SmolError("the Space's app gives an empty answer", "Nothing of the Space was sent.")
    return SmokeTest(prompt, text, start_s, answer_s, engine)
