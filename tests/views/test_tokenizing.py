"""The progress of the tokenization: one line that is written over on a terminal, calm lines elsewhere."""

from __future__ import annotations

import io

import pytest

from smolctl.data.tokens.corpus import TokenizeProgress
from smolctl.views.console import PlainConsole
from smolctl.views.output import Output
from smolctl.views.tokenizing import TokenizingView
from tests.support.terminal import Terminal

TOTAL = 40_000_000


def shown(*progress: TokenizeProgress, width: int = 80, terminal: bool = True) -> Terminal:
    """What somebody sees who has watched the tokenization come so far."""
    out, file = Output(), io.StringIO()
    out.__dict__["stderr"] = PlainConsole(
        file=file, width=width, force_terminal=terminal, force_interactive=terminal
    )
    view = TokenizingView(out)
    for one in progress:
        view(one)
    view.close()
    seen = Terminal(width, 10)
    seen.feed(file.getvalue())
    return seen


def steps(total: int | None, until: int = TOTAL) -> list[TokenizeProgress]:
    return [TokenizeProgress(read, total, read, read // 4, read) for read in range(0, until + 1, TOTAL // 20)]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_it_stays_on_one_line(width: int) -> None:
    lines = shown(*steps(TOTAL), width=width).text.splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= width
    assert lines[0].startswith("Tokenizing") or width < 80
    assert "40 MB of 40 MB" in lines[0]


def test_it_tells_share_bytes_tokens_rate_and_time() -> None:
    halfway = shown(*steps(TOTAL, TOTAL // 2), width=140).text
    for told in ("50%", "20 MB of 40 MB", "5 M tokens", "B/s", "left"):
        assert told in halfway
    done = shown(*steps(TOTAL), width=140).text
    assert "100%" in done
    assert "40 MB of 40 MB, 10 M tokens" in done
    assert "left" not in done
    streamed = shown(*steps(None), width=140).text
    assert "40 MB, 10 M tokens" in streamed
    assert " of " not in streamed


def test_every_source_of_a_mixture_has_its_line() -> None:
    lines = shown(*steps(TOTAL), *steps(TOTAL // 2, TOTAL // 2)).text.splitlines()
    assert len(lines) == 2
    assert "40 MB of 40 MB" in lines[0]
    assert "20 MB of 20 MB" in lines[1]


def test_without_a_terminal_lines_are_few() -> None:
    assert shown(*steps(TOTAL), terminal=False).text.count("Tokenizing: ") == 1
