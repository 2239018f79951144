"""The picture of the static page in the documentation: a real browser at a page, with an answer's tokens.

    smolctl push MODEL --page site
    python -m tests.support.page_screenshot site "What is gravity?" docs/images/page.png

Needs Chromium (`apt-get install chromium`) and `pip install playwright`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from smolctl.page.serve import PageServer, serving
from tests.support.space_browser import OFFLINE, PATIENCE_MS

WIDTH, HEIGHT = 1100, 560
SEED = 7


def main(site: str, question: str, target: str) -> None:
    """Write the picture of a page that has answered one question and shows how likely a token was."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("no chromium: apt-get install chromium")
    with serving(PageServer(Path(site))) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(OFFLINE))
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        page.get_by_role("button", name="Load the model").click()
        page.get_by_label("Seed").fill(str(SEED))
        page.get_by_label("Your message").fill(question)
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Tokens").click()
        page.locator(".token").nth(10).click()
        page.screenshot(path=target)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
