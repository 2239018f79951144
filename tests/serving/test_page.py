"""The chat page of the server, in a browser and as what it sends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smolctl.data.tokenizer.chatml import CHATML
from tests.support.serving import Served, serving
from tests.support.space_browser import browsing
from tests.support.tiny_models import write_folder

CONTEXT = 200


@pytest.fixture(scope="module", params=[CHATML, None], ids=["chat", "completion"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page") / "tiny"
    with serving(write_folder(folder, template=request.param, context=CONTEXT)) as server:
        yield server


def test_everything_the_page_loads_is_its_own_and_under_a_strict_policy(served: Served) -> None:
    page = served.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for path in ("/", "/page.js", "/worker.js", "/style.css", "/page.json"):
        headers = served.client.get(path).raise_for_status().headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "http" not in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("/../pyproject.toml", "/%2e%2e/chat.py", "/thread.py"):
        assert served.client.get(path).status_code == 404


def test_a_server_with_a_key_has_no_page(tmp_path: Path) -> None:
    with serving(write_folder(tmp_path / "tiny"), api_key="secret") as server:
        assert server.client.get("/").headers["content-type"].startswith("text/plain")
        assert server.client.get("/page.json").status_code == 401


def talk(page: Any, text: str) -> str:
    """The whole answer to a text that is typed."""
    page.locator("#text").fill(text)
    page.keyboard.press("Enter")
    last = page.locator(".turn").last
    last.get_by_role("button", name="Copy link").wait_for()
    answer: str = last.locator(".answer-text .text").text_content()
    return answer


@pytest.mark.slow
def test_a_visitor_talks_to_the_server(served: Served, chromium: str, tmp_path: Path) -> None:
    model = served.server.service.model
    with browsing(served.url, chromium, tmp_path) as (page, foreign, errors):
        page.set_default_timeout(20_000)
        page.set_viewport_size({"width": 1200, "height": 860})  # the settings beside the chat
        page.locator("#send:enabled").wait_for()  # nothing is to be loaded
        assert page.title() == "tiny"
        assert not page.locator("#privacy").is_visible()
        page.locator("#seed").fill("7")
        page.locator("#max_tokens").fill("30")
        page.locator("#temperature").fill("1.5")
        body = {"seed": 7, "max_tokens": 30, "temperature": 1.5}
        if model.can_chat:
            asked = {"messages": [{"role": "user", "content": "the cat"}], **body}
            (choice,) = served.post("chat/completions", **asked).json()["choices"]
            assert talk(page, "the cat") == choice["message"]["content"]
            for _ in range(6):
                talk(page, "the dog sat on the mat " * 2)
            page.get_by_text("no longer read by the model").wait_for()
        else:
            (choice,) = served.post("completions", prompt="the cat", **body).json()["choices"]
            assert talk(page, "the cat") == choice["text"]
        page.locator(".turn").last.get_by_role("button", name="Tokens").click()
        page.locator(".turn .token").last.click()
        assert page.get_by_role("dialog").locator("ol li").count() >= 6
        page.locator("#text").fill("x" * 50_000)
        page.keyboard.press("Enter")
        page.locator("#fault").get_by_text("Shorten the prompt").wait_for()
    assert foreign == []
    assert errors == []
