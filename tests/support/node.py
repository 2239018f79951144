"""JavaScript modules run in node, the one that playwright carries."""

from __future__ import annotations

import subprocess
from pathlib import Path

import smolctl

PAGE_FILES = Path(smolctl.__file__).parent / "page" / "files"


def node() -> str:
    """The path of node."""
    from playwright._impl._driver import compute_driver_executable

    return compute_driver_executable()[0]


def run_module(source: str, *arguments: str, stdin: str = "") -> str:
    """What a module prints. It imports files of the page as "./tokenizer.js", and finds its arguments in
    `process.argv` from index 2 on.

    Raises:
        AssertionError: it fails, with what it says.
    """
    whole = source.replace('from "./', f'from "{PAGE_FILES.as_uri()}/')
    command = [node(), "--no-warnings", "--input-type=module", "--eval", whole, "-", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout
