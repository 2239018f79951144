"""The Space: its folder answers by itself, in a browser too, and what the Hub says about it is passed on."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import snapshot_download

from smolctl.errors import ExitCode, SmolError
from smolctl.escaping import json_text
from smolctl.extras import install_command
from smolctl.generation.load import LoadedModel
from smolctl.hub.client import HubClient
from smolctl.native.library import Library, load_library
from smolctl.publish import smoke
from smolctl.publish.app import FACTS, MODEL, BodyLimit
from smolctl.publish.build import Built
from smolctl.publish.gradio_space import (
    APP,
    HUB_MACHINE,
    REQUIREMENTS,
    SDK_VERSION,
    TORCH,
    add_space,
    copy_package,
    write_card,
)
from smolctl.publish.push import PushOptions, PushPlan, push
from smolctl.publish.sdk import Sdk
from smolctl.publish.space_endpoints import controls_of
from smolctl.sources.huggingface.card import split_card
from tests.support.native import watched_engine
from tests.support.processes import Smolctl
from tests.support.publishing import publish
from tests.support.push_hub import Fault, PushHub
from tests.support.tiny_models import tiny_network, tiny_tokenizer


@pytest.fixture
def space(with_space: Built) -> Path:
    """The Space's folder of a model that continues text, as it goes up."""
    assert with_space.space is not None
    write_card(with_space.space, with_space.card_facts("me/tiny", "mit"), None)
    return with_space.space


def test_the_metadata_is_pinned_and_complete(space: Path) -> None:
    metadata = yaml.safe_load(split_card((space / "README.md").read_text())[0].strip().strip("-"))
    assert metadata["sdk"] == "gradio"
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["sdk_version"])
    assert metadata["sdk_version"] == SDK_VERSION
    assert metadata["python_version"] == "3.12"
    assert metadata["app_file"] == "app.py"
    assert metadata["models"] == ["me/tiny"]
    assert len(metadata["short_description"]) <= 60


def test_every_requirement_is_pinned_and_torch_comes_for_the_cpu(space: Path) -> None:
    lines = (space / "requirements.txt").read_text().splitlines()
    assert lines[0] == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert lines[1] == f"{TORCH}+cpu"
    assert all(re.fullmatch(r"[a-z0-9_-]+==[0-9.]+(\+cpu)?", line) for line in lines[1:])
    assert not any(line.startswith("gradio") for line in lines)


def test_the_app_imports_what_its_requirements_name_and_nothing_else(space: Path) -> None:
    code = (
        "import sys; from smolctl.generation.load import load_model; import smolctl.publish.app;"
        "load_model('model'); print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(space), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=space, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"tokenizers", "smolctl"} <= loaded
    assert ("torch" in loaded) is not isinstance(load_library(), Library)
    assert not loaded & {"lightning", "matplotlib", "gguf", "datasets", "transformers", "rich", "typer"}


def test_the_code_goes_along_and_only_what_is_needed(space: Path) -> None:
    assert (space / "smolctl" / "generation" / "complete.py").is_file()
    assert not (space / "smolctl" / "training").exists()
    assert not (space / "smolctl" / "cli").exists()
    assert {path.name for path in space.iterdir()} == {
        *("README.md", "app.py", "requirements.txt", "space.json", "model", "smolctl")
    }


@pytest.mark.slow
def test_the_compiled_engine_goes_along_where_the_hub_can_run_it(
    space: Path, learned: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = {path.name for path in (space / "smolctl" / "native").glob("*.so")}
    if isinstance(load_library(), Library) and (sys.platform, platform.machine()) == HUB_MACHINE:
        assert {"forward_baseline.so", "forward_avx2.so"} <= compiled
        assert smoke.smoke_test(space).engine.startswith("native ")
        assert "`forward.c`, compiled" in (space / "README.md").read_text()
    monkeypatch.setattr("smolctl.publish.gradio_space.HUB_MACHINE", ("linux", "another"))
    add_space(learned, tmp_path)
    write_card(tmp_path, learned.card_facts("me/tiny", "mit"), None)
    assert not list(tmp_path.rglob("*.so"))
    assert "runs on PyTorch" in (tmp_path / "README.md").read_text()
    engine = smoke.smoke_test(tmp_path).engine
    assert engine.startswith("torch cpu, int8")
    assert "slower, using PyTorch" in engine


def test_examples_are_the_runs_own_prompts(space: Path) -> None:
    page = json.loads((space / "space.json").read_text())
    assert page["examples"] == ["the cat", "a"]
    assert "bits per byte" in page["summary"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["space", "chat_space"])
def test_the_folder_answers_through_its_api_and_stops(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    before = sorted(folder.rglob("*"))
    result = smoke.smoke_test(folder)
    assert result.text.strip()
    assert sorted(folder.rglob("*")) == before  # nothing is left in what goes up


@pytest.mark.slow
def test_an_app_that_does_not_start_is_reported_with_its_log(space: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(space, broken)
    (broken / "space.json").write_text("{}")
    with pytest.raises(SmolError) as caught:
        smoke.smoke_test(broken)
    assert "ended with code 1" in caught.value.message
    assert "TypeError" in caught.value.hint


def test_the_controls_start_from_what_the_models_makers_recommend() -> None:
    engine, _ = watched_engine(tiny_network(context=96))
    recommended = {"temperature": 3.5, "top_k": 40, "repetition_penalty": 1.2, "min_p": 0.1}
    model = LoadedModel("tiny", engine, tiny_tokenizer(), 0.0, recommended=recommended)
    starts = {name: value for name, _, _, _, value, _ in controls_of(model)}
    expected = {
        "Maximum tokens": 95,
        "Temperature": 2.0,
        "Top-p": 0.95,
        "Top-k": 40,
        "Repetition penalty": 1.2,
    }
    assert starts == {**expected, "Seed": 0}


async def _answered(app: BodyLimit, parts: list[bytes]) -> tuple[list[bytes], list[dict[str, Any]]]:
    """What is left of a request's parts, and what was sent back."""
    waiting = [
        {"type": "http.request", "body": part, "more_body": number < len(parts)}
        for number, part in enumerate(parts, start=1)
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return waiting.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app({"type": "http", "method": "POST", "headers": []}, receive, send)
    return [message["body"] for message in waiting], sent  # type: ignore[misc]


def test_a_request_that_is_too_large_never_reaches_the_page() -> None:
    seen: list[bytes] = []

    async def page(_scope: Any, receive: Any, _send: Any) -> None:
        more = True
        while more:
            message = await receive()
            more = message["more_body"]
            seen.append(message["body"])

    app = BodyLimit(page, 10)
    assert asyncio.run(_answered(app, [b"12345", b"67890"])) == ([], [])
    assert seen == [b"12345", b"67890"]
    left, sent = asyncio.run(_answered(app, [b"12345", b"678901", b"x" * 10**6]))
    assert left == []  # a browser sees no answer while it is still sending
    assert sent[0]["status"] == 413
    assert "Shorten the text" in json.loads(sent[1]["body"])["detail"]
    assert len(seen) == 2


@pytest.mark.slow
def test_a_browser_sees_the_streamed_answer(space: Path, chromium: str, tmp_path: Path) -> None:
    from tests.support.space_browser import continue_in_browser

    with smoke.running(space) as url:
        seen = continue_in_browser(url, "the cat", chromium, tmp_path)
    assert seen.answer.startswith("the cat")
    assert len(seen.answer) > len("the cat")
    assert seen.foreign_requests == []
    assert seen.errors == []
    assert (tmp_path / "space.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_browser_chats(chat_space: Path, chromium: str, tmp_path: Path) -> None:
    from tests.support.space_browser import chat_in_browser

    written = '<img src="http://127.0.0.9/x.png"> <b>the</b> **cat** ![a](http://127.0.0.9/y.png) &lt;'
    with smoke.running(chat_space) as url:
        seen = chat_in_browser(url, written, chromium, tmp_path)
    assert seen.question == written  # as the model's own text is shown
    assert seen.answer.strip()
    assert seen.foreign_requests == []
    assert seen.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [1000, 390], ids=["desktop", "phone"])
def test_an_empty_chat_offers_examples_that_are_answered(
    width: int, chat_space: Path, chromium: str, tmp_path: Path
) -> None:
    from tests.support.space_browser import ask_example_in_browser

    with smoke.running(chat_space) as url:
        seen = ask_example_in_browser(url, "Write a haiku about rain.", width, chromium, tmp_path)
    assert seen.answer.strip()
    assert seen.foreign_requests == []
    assert seen.errors == []


def test_the_copied_parts_import_no_others(tmp_path: Path) -> None:
    copy_package(tmp_path / "smolctl")
    missing = set()
    for file in (tmp_path / "smolctl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            place = tmp_path / module.replace(".", "/")
            if module.startswith("smolctl") and not (place.is_dir() or place.with_suffix(".py").exists()):
                missing.add(module)
    assert missing == set()


@pytest.fixture
def real_space(gguf_file: Path, tmp_path: Path) -> Path:
    """The Space's folder of the real model, which is read from its GGUF."""
    folder = tmp_path / "real-space"
    copy_package(folder / "smolctl")
    (folder / "app.py").write_text(APP)
    (folder / FACTS).write_text(json_text({"title": "real", "summary": "", "examples": []}))
    (folder / MODEL).symlink_to(gguf_file)
    return folder


@pytest.mark.real_weights
@pytest.mark.parametrize(
    "rounds", [pytest.param(2, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.proof)]
)
def test_visitors_who_stop_or_close_the_page_disturb_nobody(
    rounds: int, real_space: Path, chromium: str, tmp_path: Path
) -> None:
    from tests.support.space_browser import ask_after_abandoned

    long = "Tell me about the cat that sat on the mat. " * 400  # some seconds to read
    with smoke.running(real_space) as url:
        seen = ask_after_abandoned(url, "What is the capital of France?", long, rounds, chromium, tmp_path)
    assert "Paris" in seen.undisturbed
    assert seen.answers == (seen.undisturbed,) * rounds
    assert seen.in_prefill > rounds // 2
    assert seen.errors == []


@pytest.mark.slow
def test_from_a_run_to_a_page_in_a_browser(
    learned_run: Path, hub: PushHub, chromium: str, tmp_path: Path
) -> None:
    """Run, push to the Hub, download with the real client, transformers, the Space in a browser."""
    from transformers import AutoModelForCausalLM

    from smolctl.model.weights import load_network
    from smolctl.sources import open_source
    from tests.support.space_browser import continue_in_browser

    options = PushOptions(str(learned_run), "me/tiny", space="me/demo", space_sdk=Sdk.GRADIO)
    plans: list[PushPlan] = []
    pushed = push(options, HubClient(print), plans.append)
    assert plans[0].built.smoke is not None  # it was tried before anything was sent
    assert pushed.space is not None
    assert pushed.space_stage == "RUNNING"
    assert hub.repos["spaces/me/demo"].sdk == "gradio"
    assert hub.repos["spaces/me/demo"].private
    model = snapshot_download("me/tiny", local_dir=tmp_path / "model", endpoint=hub.url)
    theirs = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).eval()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        ours = load_network(open_source(str(learned_run)))(ids)
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-4, atol=1e-4)
    folder = Path(
        snapshot_download("me/demo", repo_type="space", local_dir=tmp_path / "demo", endpoint=hub.url)
    )
    with smoke.running(folder) as url:
        assert len(continue_in_browser(url, "the cat", chromium, tmp_path).answer) > 7


PLAN_MISSING = "hosting Gradio Spaces on free cpu-basic requires a PRO subscription"


def assert_says_what_an_account_needs(message: str, hint: str, hub: PushHub) -> None:
    assert "the model itself is published" in message
    assert "static Space" in hint
    assert "PRO" in hint
    assert "model.safetensors" in hub.repos["models/me/tiny"].head


@pytest.mark.parametrize("status", [402, 403])
def test_an_account_without_a_plan_is_told_what_it_needs_and_the_model_is_up(
    status: int, with_space: Built, hub: PushHub
) -> None:
    hub.make("models/me/tiny")
    hub.faults = [Fault("repos/create", status, message=PLAN_MISSING)]
    pushed = publish(with_space, repo="me/tiny", space="me/demo", space_sdk=Sdk.GRADIO)
    assert pushed.space is None
    assert pushed.space_error is not None
    assert pushed.space_error.exit_code == ExitCode.HUB
    assert_says_what_an_account_needs(pushed.space_error.message, pushed.space_error.hint, hub)


@pytest.mark.slow
def test_the_command_ends_with_the_hubs_code_when_only_the_space_was_refused(
    learned_run: Path, hub: PushHub, smolctl: Smolctl
) -> None:
    hub.make("models/me/tiny")
    hub.faults = [Fault("repos/create", 402, message=PLAN_MISSING)]
    called = smolctl(
        "push", learned_run, "--repo", "me/tiny", "--space", "me/demo", "--space-sdk", "gradio", "--json"
    )
    assert called.code == ExitCode.HUB
    document = json.loads(called.out)
    assert document["repo"]["verified"] is True
    assert document["space"] is None
    error = json.loads(called.err.splitlines()[-1])["error"]
    assert_says_what_an_account_needs(error["message"], error["hint"], hub)


@pytest.mark.parametrize("stage", ["BUILD_ERROR", "RUNTIME_ERROR", "CONFIG_ERROR"])
def test_a_space_that_does_not_build_shows_its_log(stage: str, with_space: Built, hub: PushHub) -> None:
    repo = hub.make("spaces/me/demo", sdk="gradio")
    repo.stages, repo.logs = ["BUILDING", "APP_STARTING", stage], ["step 1\n", "ERROR: no torch\n"]
    notes: list[str] = []
    pushed = publish(with_space, notes, repo="me/tiny", space="me/demo", space_sdk=Sdk.GRADIO)
    assert pushed.space_error is not None
    assert stage in pushed.space_error.message
    assert "ERROR: no torch" in pushed.space_error.hint
    wanted = "logs/run" if stage == "RUNTIME_ERROR" else "logs/build"
    assert hub.requests(wanted)
    assert "spaces/me/demo: BUILDING" in notes


def test_pushing_the_space_again_sends_nothing(with_space: Built, hub: PushHub) -> None:
    publish(with_space, repo="me/tiny", space="me/demo", space_sdk=Sdk.GRADIO)
    again = publish(with_space, repo="me/tiny", space="me/demo", space_sdk=Sdk.GRADIO)
    assert again.space is not None
    assert again.space.commit.sent == ()
    repo = hub.repos["spaces/me/demo"]
    assert len(repo.commits) == 2
    card = (repo.head["README.md"].content or b"").decode().replace("title: tiny", "title: My page")
    repo.commit(
        "main", {**repo.head, "README.md": type(repo.head["README.md"])(card.encode(), len(card))}, "t"
    )
    third = publish(with_space, repo="me/tiny", space="me/demo", space_sdk=Sdk.GRADIO)
    assert third.space is not None
    assert third.space.commit.sent == ()  # the title that somebody chose stays


def test_without_gradio_one_line_says_so(
    learned_run: Path, smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolctl.publish.smoke.importlib.util.find_spec", lambda _name: None)
    called = smolctl("push", learned_run, "--preview", "--space-sdk", "gradio")
    assert called.code == 1
    assert install_command("space") in called.err


@pytest.mark.slow
def test_the_requirements_install_together_and_run_the_page(space: Path, tmp_path: Path) -> None:
    """In a fresh environment, which has nothing of this project."""
    if os.environ.get("CI") != "true" and "SMOLCTL_TEST_FRESH" not in os.environ:
        pytest.skip("installs a gigabyte: set SMOLCTL_TEST_FRESH=1")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    added_by_the_hub = (f"gradio[oauth,mcp]=={SDK_VERSION}", "spaces")
    wanted = [TORCH, *REQUIREMENTS, *added_by_the_hub]
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert smoke.smoke_test(space, str(python)).text.strip()
