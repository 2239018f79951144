"""The page's code as it is published: what it may do, and how much there is of it."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

import smolctl

CODE = Path(smolctl.__file__).parent / "page" / "files"
SCRIPTS = sorted(CODE.glob("*.js"))
MOST_BYTES = 60_000  # of all code, compressed
# What turns text into markup or code. A model's text, a visitor's and a link's can only be text.
MARKUP = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(.on"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_script_makes_markup_or_code_of_text(script: Path) -> None:
    assert not re.search(MARKUP, script.read_text())


def test_the_document_has_nothing_inline_that_its_policy_forbids() -> None:
    document = (CODE / "index.html").read_text()
    assert "default-src 'none'" in document
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", document)


def test_all_code_together_is_small() -> None:
    code = b"".join(path.read_bytes() for path in sorted(CODE.iterdir()))
    assert len(gzip.compress(code, 9)) <= MOST_BYTES
