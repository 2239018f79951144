"""Escapes text of models and users for a terminal, for Markdown, and for one line of JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

# Characters that a terminal or a renderer would interpret instead of showing them. ASCII's are replaced by
# Unicode's symbols for them; Unicode's own (C1, line and paragraph separators, changes of direction) by the
# replacement character.
_VISIBLE: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    127: 0x2421,
    **dict.fromkeys(
        (*range(0x80, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)), "\N{REPLACEMENT CHARACTER}"
    ),
}


# JSON itself escapes ASCII's control characters below 32. The others are escaped here, so that JSON is safe
# on a terminal; an unpaired surrogate, which may come from an invalid file name, has no UTF-8.
_UNESCAPED = re.compile(f"[{''.join(chr(code) for code in _VISIBLE if code >= 127)}\ud800-\udfff]")


def for_terminal(text: str) -> str:
    """A text that is safe on a terminal: no character except line ends and tabs controls it."""
    return text if text.isprintable() else text.translate(_VISIBLE)


def fenced(text: str) -> list[str]:
    """A text as the lines of a code block whose fence is longer than any run of backticks in it."""
    if not text:
        return ["*(ended at once)*"]
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}text", text.translate(_VISIBLE), fence]


def code_span(text: str) -> str:
    """A text as inline code on one line; line ends, tabs and outer spaces are made visible."""
    text = one_line(text)
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    text = "␣" * before + inner + "␣" * (len(text) - before - len(inner)) if inner else "␣" * len(text)
    if not text:
        return "(nothing)"
    ticks = "`" * (_longest_run(text) + 1)
    gap = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{gap}{text}{gap}{ticks}"


def one_line(text: str) -> str:
    """A text on one line, with line ends, tabs and control characters made visible."""
    return text.replace("\n", "⏎").replace("\t", "⇥").translate(_VISIBLE)


def is_utf8(text: str) -> bool:
    """Whether a text of the operating system, such as the name of a file, consists of UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_characters(text: str) -> str:
    """A text with unpaired surrogates, which tokenizers refuse, replaced by replacement characters.

    JSON escapes can contain unpaired surrogates, and Python reads invalid UTF-8 of the command line as such.
    Matching pairs become their character.
    """
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON for every reader. smolctl writes and prints all its JSON with this function.

    JSON has no NaN and no infinity: they become null. Control characters are escaped. Without `indent` it is
    one line, also for readers that treat Unicode's separators as line ends.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)
    return _UNESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    """Nested values with None instead of numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
