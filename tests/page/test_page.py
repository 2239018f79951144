"""The page as a visitor meets it, in a real browser: what it does, and what it says when something fails."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest

from tests.support.page_site import EXAMPLE, ISOLATION, TITLE, VERDICT, PageServer, Spoil, write_site
from tests.support.space_browser import OFFLINE

pytestmark = pytest.mark.slow

PATIENCE_MS = 30_000
AXE = "https://registry.npmjs.org/axe-core/-/axe-core-4.10.3.tgz"
AXE_SHA256 = "0f2b4d7dcdf7d1219df8d1959ad68e565f51d14c3f0d88bb71cd59abeb956292"
REFUSING = "WebAssembly.Memory = class { constructor() { throw new RangeError('refused'); } };"
SILENT = "WebAssembly.instantiate = () => new Promise(() => {});"
# A token every 20 ms, as with a real model: what is seen while an answer grows can be looked at.
SLOW = """globalThis.MessageChannel = class {
  port1 = {}; port2 = { postMessage: () => setTimeout(() => this.port1.onmessage(), 20) };
};"""
STOPPING = """let left = 30; globalThis.MessageChannel = class {
  port1 = {}; port2 = { postMessage: () => {
    if (!left--) throw new WebAssembly.RuntimeError("unreachable");
    setTimeout(() => this.port1.onmessage());
  } };
};"""
FULL = "Cache.prototype.put = async () => { throw new DOMException('full', 'QuotaExceededError'); };"


@pytest.fixture(scope="session")
def site(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The page of a model that chats."""
    return once("page-chat", write_site) / "site"


@pytest.fixture(scope="session")
def completion_site(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The page of a model that continues text."""
    return once("page-completion", lambda folder: write_site(folder, None)) / "site"


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """Debian's Chromium, one for all tests of this file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(OFFLINE))
        yield browser
        browser.close()


@contextmanager
def visiting(browser: Any, url: str, errors: int = 0, **options: Any) -> Iterator[Any]:
    """A visitor's page, with a profile of its own. It may ask no other host, and no script of it may fail.

    Args:
        browser: from playwright.
        url: of the page.
        errors: lines in the console that are expected.
        options: of the profile.
    """
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    own = urljoin(url, ".")
    page.on(
        "request", lambda request: None if request.url.startswith(own) else complaints.append(request.url)
    )
    page.goto(url)
    yield page
    assert len(complaints) == errors, complaints
    context.close()


def load(page: Any) -> None:
    page.get_by_role("button", name="Load the model").click()
    page.locator("#send:enabled").wait_for()


def ask(page: Any, text: str) -> str:
    """The whole answer to a text that is typed."""
    page.locator("#text").fill(text)
    page.keyboard.press("Enter")
    return answer(page)


def answer(page: Any) -> str:
    """The last answer once it has ended."""
    last = page.locator(".turn").last
    last.get_by_role("button", name="Copy link").wait_for()
    page.locator("#send").wait_for()  # what is typed is taken again
    text: str = last.locator(".answer-text .text").text_content()
    return text


def endless(body: bytes) -> bytes:
    """A page.json by which no token ends an answer."""
    page = json.loads(body)
    page["tokenizer"]["ends"] = []
    return json.dumps(page).encode()


def test_a_visitor_loads_asks_stops_regenerates_and_edits(browser: Any, site: Path) -> None:
    with PageServer(site) as server:
        server.spoil("page.json", endless)
        server.prepend("worker.js", SLOW)
        with visiting(browser, server.url) as page:
            check_a_visit(page, server)


def check_a_visit(page: Any, server: PageServer) -> None:
    page.get_by_text("MB to download, kept in this browser").wait_for()
    assert page.title() == page.locator("#title").text_content() == TITLE  # and no markup of it
    assert not any(path.startswith("model/part") for path in server.requests)  # before a click
    assert VERDICT in page.locator("#about").text_content()
    load(page)
    page.get_by_label("Longest answer").fill("9")
    page.get_by_role("button", name=EXAMPLE).click()
    first = answer(page)
    assert first
    assert page.locator("#status").text_content().startswith("Answer complete")
    assert "seed" in page.locator(".meta").text_content()

    asked = "<img src=x onerror=alert(1)> & <b>bold</b>"
    ask(page, asked)
    assert page.locator(".turn").last.locator(".question .text").text_content() == asked
    assert page.locator(".turn img, .turn b").count() == 0

    before = page.locator(".turn").last.locator(".meta").text_content()
    page.get_by_role("button", name="Regenerate").last.click()
    answer(page)
    assert page.locator(".turn").last.locator(".meta").text_content() != before  # by its seed at least

    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit the text").fill("a dog")
    page.get_by_role("button", name="Send again").click()
    answer(page)
    assert page.locator(".turn").count() == 1  # what came after it went

    page.get_by_label("Longest answer").fill("4000")
    page.locator("#text").fill("the dog")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").click()
    answer(page)
    assert "stopped by you" in page.locator(".turn").last.locator(".meta").text_content()
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0


def test_a_link_reproduces_the_answer_elsewhere(browser: Any, site: Path) -> None:
    with PageServer(site) as server:
        with visiting(browser, server.url) as page:
            page.locator("#variants").get_by_label("int4").check()
            load(page)
            page.get_by_label("System message").fill("Say & mean it.")
            page.get_by_label("Temperature").fill("1.3")
            ask(page, "the cat")
            page.get_by_label("Temperature").fill("0.9")
            wanted = ask(page, "and the dog? + % #")
            page.get_by_role("button", name="Copy link").last.click()
            link = page.url
        with visiting(browser, link) as page:
            notice = page.locator(".notice").text_content()
            assert "writes the same answer again" in notice
            assert page.get_by_label("System message").input_value() == "Say & mean it."
            load(page)
            page.get_by_role("button", name="Send").click()
            assert answer(page) == wanted
        with visiting(browser, link.replace("weights=", "weights=0")) as page:
            assert "may differ" in page.locator(".notice").text_content()
        with visiting(browser, link.split("seed=")[0]) as page:
            page.get_by_role("alert").get_by_text("part of it is missing").wait_for()


def test_the_second_visit_downloads_no_weights(browser: Any, site: Path) -> None:
    with PageServer(site) as server, visiting(browser, server.url) as page:
        load(page)
        parts = {path: count for path, count in server.requests.items() if "/part-" in path}
        assert len(parts) > 2
        page.reload()
        page.locator("#send:enabled").wait_for()  # without a click
        assert ask(page, "the cat")
        assert {path: count for path, count in server.requests.items() if "/part-" in path} == parts

        other = page.context.new_page()  # a second tab does not fill the memory by itself
        other.goto(server.url)
        other.get_by_text("Another tab has this page open").wait_for()
        assert other.get_by_role("button", name="Load the model").is_visible()
        other.close()

        page.locator("#open-panel").evaluate("button => button.click()")
        page.get_by_role("button", name="Remove the model from this browser").click()
        page.locator("#status", has_text="Removed from this browser").wait_for(state="attached")
        page.reload()
        page.get_by_text("to download, kept in this browser").wait_for()


def flipped(body: bytes) -> bytes:
    return body[:100] + bytes([body[100] ^ 1]) + body[101:]


def test_bad_parts_are_fetched_again_alone(browser: Any, site: Path) -> None:
    with PageServer(site) as server, visiting(browser, server.url) as page:
        server.spoil("model/part-00", flipped, times=1)
        server.spoil("model/part-01", lambda body: body[:-7], times=1)
        server.spoil("model/part-02", lambda body: body + b"x", times=1)
        load(page)
        parts = {path[-7:]: count for path, count in server.requests.items() if "/part-" in path}
        assert parts == {"part-00": 2, "part-01": 2, "part-02": 2, "part-03": 1}
        assert ask(page, "the cat")


@pytest.mark.parametrize(
    ("spoil", "requests", "sentence"),
    [
        (lambda body: 404, 1, "part-01 could not be downloaded: the server answers 404"),
        (flipped, 3, "part-01 arrives damaged: its SHA-256 is not the published one"),
    ],
    ids=["missing", "damaged"],
)
def test_a_download_that_fails_says_so_and_goes_on_from_there(
    spoil: Spoil, requests: int, sentence: str, browser: Any, site: Path
) -> None:
    with PageServer(site) as server, visiting(browser, server.url) as page:
        server.spoil("model/part-01", spoil)
        page.get_by_role("button", name="Load the model").click()
        page.get_by_role("alert").get_by_text(sentence).wait_for()
        assert server.requests["model/part-01"] == requests
        page.get_by_text("the rest is in this browser already").wait_for()
        server.mend()
        page.get_by_role("button", name="Try again").click()
        page.locator("#send:enabled").wait_for()
        assert server.requests["model/part-00"] == 1
        assert ask(page, "the cat")


def test_memory_that_is_refused_or_never_comes_offers_less(browser: Any, site: Path) -> None:
    with PageServer(site) as server:
        server.spoil("page.json", endless)
        server.prepend("engine.js", REFUSING)
        with visiting(browser, server.url) as page:
            page.get_by_role("button", name="Load the model").click()
            page.get_by_text("The browser has refused").wait_for()
            offers = page.locator("#fault button").all_text_contents()
            assert [offer.split(" (")[0] for offer in offers] == [
                "Use 1,024 tokens of context",
                "Use 512 tokens of context",
                "Use int4",
                "Try again",
            ]
            assert not any("/part-" in path for path in server.requests)  # it is asked for first
        server.prepend("engine.js", SILENT)
        with visiting(browser, server.url) as page:
            page.clock.install()
            page.reload()
            page.get_by_role("button", name="Load the model").click()
            silent = page.get_by_text("The browser did not respond to the request for the memory")
            for _ in range(20):  # on a busy machine, the page may ask late
                page.wait_for_timeout(500)
                page.clock.run_for(30_000)
                if silent.is_visible():
                    break
            assert silent.is_visible()
            server.mend()
            page.get_by_role("button", name="Use 512 tokens of context").click()
            page.locator("#send:enabled").wait_for()
            assert "512 tokens" in page.locator("#details").text_content()
            page.get_by_label("Longest answer").fill("200")
            for _ in range(3):  # the oldest turn goes where there is no room
                ask(page, "the cat")
            assert (
                "no longer read by the model"
                in page.locator(".turn").nth(0).locator("~ .forgotten").text_content()
            )


def test_an_engine_that_stops_leaves_what_it_wrote(browser: Any, site: Path) -> None:
    with PageServer(site) as server:
        server.spoil("page.json", endless)
        server.prepend("worker.js", STOPPING, times=1)
        with visiting(browser, server.url) as page:
            load(page)
            page.locator("#text").fill("the cat")
            page.keyboard.press("Enter")
            page.get_by_role("alert").get_by_text("The model has stopped: unreachable").wait_for()
            assert "interrupted" in page.locator(".turn .meta").text_content()
            written = page.locator(".answer-text .text").text_content()
            page.get_by_role("button", name="Load the model again").click()
            page.locator("#send:enabled").wait_for()
            assert ask(page, "and the dog")
            assert page.locator(".answer-text .text").first.text_content() == written


def test_without_room_or_https_it_works_and_says_so(browser: Any, site: Path) -> None:
    with PageServer(site) as server:
        server.prepend("worker.js", FULL)
        with visiting(browser, server.url) as page:
            load(page)
            page.get_by_text("has no room to keep the model").wait_for()
            assert ask(page, "the cat")
        insecure = "delete CacheStorage.prototype.open; delete Crypto.prototype.subtle;"
        server.prepend("worker.js", insecure)
        server.prepend("page.js", insecure)
        with visiting(browser, server.url) as page:
            page.get_by_text("this browser keeps nothing for this address").wait_for()
            load(page)
            assert ask(page, "the cat")


def test_a_browser_or_a_page_that_cannot_work_says_so(browser: Any, site: Path) -> None:
    later = json.dumps({"format": "smolctl-page", "version": 2}).encode()
    with PageServer(site) as server:
        server.prepend("runner.js", "WebAssembly.validate = () => false;")
        with visiting(browser, server.url) as page:
            page.get_by_role("alert").get_by_text("has no WebAssembly with SIMD").wait_for()
        server.prepend("runner.js", "Worker = class { constructor() { throw new Error(); } };")
        with visiting(browser, server.url) as page:
            page.get_by_role("alert").get_by_text("did not start").wait_for()
        server.mend()
        server.spoil("page.json", lambda body: later)
        with visiting(browser, server.url) as page:
            page.get_by_role("alert").get_by_text("was written by a later version of smolctl").wait_for()
            assert page.get_by_role("button", name="Reload the page").is_visible()
        server.mend()
        with visiting(browser, (site / "index.html").as_uri(), errors=2) as page:
            page.get_by_text("Is it open as a file?").wait_for()


def test_where_it_is_isolated_threads_are_measured_and_remembered(browser: Any, site: Path) -> None:
    with PageServer(site, ISOLATION) as server, visiting(browser, server.url) as page:
        load(page)
        assert "by a measurement here" in page.locator("#details").text_content()
        with_threads = ask(page, "the cat")
        page.get_by_role("button", name="Copy link").click()
        link = page.url.replace(server.url, "")
        page.reload()
        page.locator("#send:enabled").wait_for()
        assert "by a measurement here" not in page.locator("#details").text_content()
    with PageServer(site, ISOLATION) as server:
        server.prepend("thread.js", "throw new Error('no helper');")
        with visiting(browser, server.url + link) as page:
            load(page)
            page.get_by_role("button", name="Send").click()
            assert answer(page) == with_threads


def test_a_text_is_continued_where_the_model_has_no_template(browser: Any, completion_site: Path) -> None:
    with PageServer(completion_site) as server, visiting(browser, server.url) as page:
        server.spoil("page.json", endless)
        page.reload()
        load(page)
        assert page.locator("#system-row").is_hidden()
        page.evaluate("window.requestAnimationFrame = () => 1")  # as in a tab that is not seen
        page.get_by_label("Longest answer").fill("12")
        first = ask(page, "the cat")
        page.locator(".turn").get_by_role("button", name="Continue").click()
        page.locator(".turn").nth(1).wait_for()
        answer(page)
        assert page.locator(".turn").nth(1).locator(".question .text").text_content() == "the cat" + first
        page.get_by_label("Longest answer").fill("4000")
        ask(page, "the cat " * 700)  # 2,048 is the context unless the visitor takes more
        assert "the context is full" in page.locator(".turn").last.locator(".meta").text_content()
        page.locator("#text").fill("the cat " * 4_000)
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("too long for the model").wait_for()
        assert page.locator("#text").input_value() == "the cat " * 4_000  # nothing is lost
        page.get_by_role("button", name="Dismiss").click()
        assert ask(page, "the cat")


def test_everything_works_by_keyboard(browser: Any, site: Path) -> None:
    def press_until(page: Any, name: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.evaluate("document.activeElement.textContent || document.activeElement.id")
            if focused == name:
                return
        raise AssertionError(f"{name} is out of reach")

    with (
        PageServer(site) as server,
        visiting(browser, server.url, viewport={"width": 390, "height": 800}) as page,
    ):
        press_until(page, "Load the model")
        page.keyboard.press("Enter")
        page.locator("#send:enabled").wait_for()
        assert page.evaluate("document.activeElement.id") == "text"
        page.keyboard.type("the cat")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("sat")
        page.keyboard.press("Enter")
        answer(page)
        assert page.locator(".question .text").text_content() == "the cat\nsat"
        page.keyboard.press("Shift+Tab")
        page.locator("#scroll").focus()
        press_until(page, "Tokens")
        page.keyboard.press("Enter")
        page.keyboard.press("Shift+Tab")
        for _ in range(8):  # back over the buttons to the tokens
            if page.evaluate("document.activeElement.className") == "token":
                break
            page.keyboard.press("Shift+Tab")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        card = page.get_by_role("dialog")
        assert "id " in card.text_content()
        assert "%" in page.locator("#status").text_content()
        place = card.locator(".hint").last.text_content()
        page.keyboard.press("ArrowRight")
        assert card.locator(".hint").last.text_content() != place
        page.keyboard.press("Escape")
        assert card.count() == 0
        assert page.evaluate("document.activeElement.className") == "token"
        page.locator("#open-panel").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "close-panel"
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "open-panel"


@pytest.fixture(scope="session")
def axe(session_folder: Path) -> str:
    """The script of axe-core, from the npm registry."""
    try:
        with urllib.request.urlopen(AXE, timeout=20) as response:
            packed = response.read()
    except (urllib.error.URLError, OSError) as error:
        pytest.skip(f"axe-core cannot be fetched: {error}")
    assert hashlib.sha256(packed).hexdigest() == AXE_SHA256
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        script = archive.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(scheme: str, width: int, browser: Any, site: Path, axe: str) -> None:
    def check(page: Any) -> None:
        found = page.evaluate(
            "async () => (await axe.run(document, {resultTypes: ['violations']})).violations"
        )
        assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    looks: dict[str, Any] = {
        "viewport": {"width": width, "height": 860},
        "color_scheme": scheme,
        "bypass_csp": True,
    }
    with PageServer(site) as server, visiting(browser, server.url, **looks) as page:
        server.spoil("page.json", endless)
        server.prepend("worker.js", SLOW)
        page.reload()
        page.evaluate(axe)
        check(page)
        load(page)
        page.locator("#text").fill("the cat")
        page.keyboard.press("Enter")
        page.locator(".token:visible").nth(3).wait_for()
        check(page)
        assert page.get_by_role("button", name="Stop").is_visible()
        page.keyboard.press("Escape")
        answer(page)
        page.get_by_role("button", name="Tokens").click()
        page.locator(".token:visible").nth(3).click()
        check(page)
