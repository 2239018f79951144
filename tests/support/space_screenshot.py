"""The picture of a Space's page in README.md: a real browser at a run's page.

    python -m tests.support.space_screenshot runs/nano-001 "def __init__(self" benchmarks/space.png

Needs Chromium (`apt-get install chromium`) and `pip install '.[space]' playwright`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from smolctl.generation.load import load_model
from smolctl.publish.push import PushOptions, build_preview
from smolctl.publish.smoke import running
from tests.support.space_browser import chat_in_browser, continue_in_browser


def main(run: str, prompt: str, target: str) -> None:
    """Write the picture of a page that has answered one prompt."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("no chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as work:
        space = build_preview(PushOptions(run), Path(work))
        chats = load_model(str(space / "model")).can_chat
        visit = chat_in_browser if chats else continue_in_browser
        with running(space) as url:
            seen = visit(url, prompt, chromium, Path(work))
        shutil.copyfile(Path(work) / ("chat.png" if chats else "space.png"), target)
    print(f"{target}: {Path(target).stat().st_size:,} bytes; the answer came in {seen.versions} versions")
    print(seen.answer)


if __name__ == "__main__":
    main(*sys.argv[1:4])
