"""A real browser at the page of a Space."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What keeps Chromium from looking for the network by itself.
OFFLINE = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 120_000  # for machines that do much else


@dataclass(frozen=True)
class Seen:
    """What the visitor saw."""

    answer: str
    versions: int  # of the answer, as it grew
    foreign_requests: list[str]
    errors: list[str]
    question: str = ""  # as the page shows it


@contextmanager
def browsing(url: str, chromium: str, folder: Path) -> Iterator[tuple[Any, list[str], list[str]]]:
    """A page of the browser, the requests to other hosts, and the errors of the console."""
    from playwright.sync_api import sync_playwright

    foreign: list[str] = []
    errors: list[str] = []
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(folder / "profile"),
            executable_path=chromium,
            args=list(OFFLINE),
            viewport={"width": 1000, "height": 860},
            device_scale_factor=1,
        )
        page = context.pages[0]
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", lambda request: _note_foreign(request.url, url, foreign))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        yield page, foreign, errors
        context.close()


def _note_foreign(asked: str, url: str, foreign: list[str]) -> None:
    if not asked.startswith((url, "data:", "blob:")):
        foreign.append(asked)


def continue_in_browser(url: str, prompt: str, chromium: str, folder: Path) -> Seen:
    """Type a prompt into the completion page, press the button, wait for the end; leaves space.png."""
    with browsing(url, chromium, folder) as (page, foreign, errors):
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.get_by_role("button", name="Continue", exact=True).click()
        box = page.locator("#continuation textarea")
        answer, versions = _settled(page, lambda: box.input_value(), prompt)
        page.screenshot(path=folder / "space.png")
        return Seen(answer, versions, foreign, errors)


def ask_example_in_browser(url: str, example: str, width: int, chromium: str, folder: Path) -> Seen:
    """Click on an example in the empty chat; leaves empty.png and chat.png. The page must fit the width."""
    with browsing(url, chromium, folder) as (page, foreign, errors):
        page.set_viewport_size({"width": width, "height": 860})
        button = page.locator("button.example", has_text=example)
        button.wait_for()
        page.screenshot(path=folder / "empty.png")
        if page.evaluate("document.documentElement.scrollWidth") > width:
            errors.append("the page is wider than the window")
        button.click()
        answer, versions = _answer(page)
        page.screenshot(path=folder / "chat.png")
        return Seen(answer, versions, foreign, errors)


def chat_in_browser(url: str, message: str, chromium: str, folder: Path) -> Seen:
    """Type a message into the chat page and wait for the end of the answer; leaves chat.png."""
    with browsing(url, chromium, folder) as (page, foreign, errors):
        page.get_by_role("textbox").last.fill(message)
        page.keyboard.press("Enter")
        answer, versions = _answer(page)
        page.screenshot(path=folder / "chat.png")
        return Seen(answer, versions, foreign, errors, page.locator(".message.user").last.inner_text())


@dataclass(frozen=True)
class Abandoned:
    """What became of prompts that were asked right after others had been abandoned."""

    undisturbed: str  # the answer to the same prompt before that
    answers: tuple[str, ...]
    in_prefill: int  # of the abandoned prompts, those of which no text had come yet
    errors: list[str]


def ask_after_abandoned(
    url: str, prompt: str, long: str, rounds: int, chromium: str, folder: Path
) -> Abandoned:
    """In every round a visitor asks something long and presses stop, or closes the page, in turn and after
    a time of chance. At once another one asks the prompt, greedily."""
    chance, answers, in_prefill = random.Random(0), [], 0
    with browsing(url, chromium, folder) as (page, _, errors):
        _take_the_likeliest(page)
        undisturbed = _ask(page, prompt)
        for number in range(rounds):
            leaver = page.context.new_page()
            leaver.goto(url)
            leaver.get_by_role("textbox").last.fill(long)
            leaver.keyboard.press("Enter")
            stop = leaver.locator("button.stop-button")
            stop.wait_for()
            leaver.wait_for_timeout(chance.random() * 3_000)
            in_prefill += leaver.locator(".message.bot.pending").count()
            page.get_by_role("textbox").last.fill(prompt)
            if number % 2:
                leaver.close()
            else:
                stop.click()
            answers.append(_ask(page, prompt))
            leaver.close()
    return Abandoned(undisturbed, tuple(answers), in_prefill, errors)


def _take_the_likeliest(page: Any) -> None:
    page.get_by_role("button", name="Sampling").click()
    temperature = page.get_by_label("number input for Temperature")
    slider = page.get_by_label("range slider for Temperature")
    while slider.input_value() != "0":  # a page that is not ready yet takes no notice of what is typed
        temperature.fill("0")
        temperature.press("Tab")
        page.wait_for_timeout(100)


def _ask(page: Any, prompt: str) -> str:
    """The whole answer to the only message of a chat, which is empty again then."""
    page.get_by_role("textbox").last.fill(prompt)
    page.keyboard.press("Enter")
    answer, _ = _answer(page)  # the stop button may come and go unseen
    page.locator("button.submit-button").wait_for()
    page.get_by_label("Clear").click()
    page.locator(".message.bot").last.wait_for(state="detached")
    return answer


def _answer(page: Any) -> tuple[str, int]:
    """The last message of the model, whole, and how many versions it had."""
    bot = page.locator(".message.bot").last
    bot.wait_for()
    page.locator(".message.bot.pending").wait_for(state="detached")  # until then it says "Loading content"
    return _settled(page, bot.inner_text, "")


def _settled(page: Any, read: Any, start: str) -> tuple[str, int]:
    """A text once it has begun and then not changed for two seconds, and how many versions it had."""
    versions = [read()]
    quiet = 0
    for _ in range(PATIENCE_MS // 100):
        page.wait_for_timeout(100)
        now = read()
        quiet = quiet + 1 if now == versions[-1] else 0
        if now != versions[-1]:
            versions.append(now)
        if now and now != start and quiet >= 20:
            break
    return versions[-1], len(versions)
