"""Documents, and the places where a long one can be cut without changing a token."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from smolctl.data.text.conversations import shape_of
from smolctl.errors import InputError
from smolctl.escaping import whole_characters

# Small pieces keep an encoder's working set in the CPU's cache and spread evenly over the cores.
PIECE = 16 * 1024  # characters
# Characters; a text without a safe place is cut here anyway. Encoding so much takes about 2 GB of memory.
LONGEST_PIECE = 16 * 1024 * 1024

# Where a cut is likely to be safe: after a single newline, or before a single space, between two visible
# characters (no white space, no mark that joins the character before it, no SentencePiece "▁").
#
# Byte-level BPE merges within the matches of a regex only, so a cut is safe where one match ends and
# the next begins, provided that both still do when the other side is gone. GPT-2's regex (SmolLM's
# too, which splits digits off before) is
# 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+.
# A match of visible characters ends before white space, whatever follows. A single space then begins
# the next match, together with the visible character after it, or by itself before a digit that was
# split off. A single newline is a match of its own: by `\s+` within the text, where a visible
# character forbids `\s+(?!\S)`, and by `\s+(?!\S)` at the end of a piece. No alternative looks back.
# Of two white spaces in a row the last may join what follows: not safe. The cut is after a newline
# and not before it because newer regexes end a run of punctuation with `[\r\n]*`.
# The visible ones are letters, digits, and the punctuation of ASCII, General Punctuation, CJK and full width.
_VISIBLE = r"[\w!-~\u2010-\u2027\u2030-\u205e\u3001-\u3029\uff01-\uff5e]"
_LIKELY_CUT = re.compile(rf"(?<={_VISIBLE}\n)(?={_VISIBLE})|(?<={_VISIBLE})(?= {_VISIBLE})")
_LAST_SPACE = re.compile(r"\s\S*\Z")

# Called with the number of bytes of a source that were read since the last call.
OnRead = Callable[[int], None]


@dataclass(frozen=True)
class Document:
    """One text as chunks of any length, whose concatenation is the whole text. They can be iterated only
    once.
    """

    name: str
    chunks: Iterator[str]


def cut(
    chunks: Iterable[str],
    size: int = PIECE,
    longest: int = LONGEST_PIECE,
    is_safe: Callable[[str, int], bool] = lambda text, place: True,
    ahead: int = 0,
) -> Iterator[str]:
    """Cut a text into pieces of about `size` characters at places that are likely to be safe.

    Args:
        chunks: the text, in parts of any length.
        size: a piece ends at the first safe place after this many characters.
        longest: without a safe place a piece ends here, at white space if there is any near.
        is_safe: makes the final decision on a place, given the current part of the text and an index into it.
        ahead: characters after the place that `is_safe` needs.
    """
    buffer, looked = "", 0  # searched without a result up to here
    for chunk in chunks:
        buffer += chunk
        start = 0
        while True:
            last = min(start + longest, len(buffer) - ahead)
            first = max(start + size, looked)
            while (likely := _LIKELY_CUT.search(buffer, first, last)) and not is_safe(buffer, likely.end()):
                first = likely.end() + 1 + size // 16  # after one refusal, many may follow
            if likely:
                end = likely.end()
            elif len(buffer) - start >= longest + ahead:
                end = _forced_cut(buffer, start, size, start + longest)
            else:
                looked = max(first, last - 2)  # the pattern looks at two characters after a place
                break
            yield buffer[start:end]
            start = end
        buffer, looked = buffer[start:], looked - start
    if buffer:
        yield buffer


def _forced_cut(text: str, start: int, size: int, stop: int) -> int:
    space = _LAST_SPACE.search(text, max(start + 1, stop - size), stop)
    return space.start() if space else stop


def text_of(row: Mapping[str, Any], text_field: str, where: str) -> str:
    """The text of a row; empty if it is null.

    Args:
        row: its fields.
        text_field: the one that holds the text.
        where: the row's origin for people.

    Raises:
        InputError: there is no such field, or it does not hold text.
    """
    if text_field not in row:
        raise no_text(where, f"no field {text_field!r}", row)
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise InputError(
            f"{where}: field {text_field!r} is not text ({type(text).__name__})",
            "Write it as one text, take it out, or name another field in data.text_field.",
        )
    return whole_characters(text or "")


def no_text(where: str, reason: str, names: Iterable[str]) -> InputError:
    """The message about a row or table whose text is not found among its fields or columns."""
    fields = tuple(names)
    hint = (
        "Set data.text_field to the field or column that holds the text, or to a list of one for each source."
    )
    if len(fields) == 1:
        hint = f"If it holds the text: --set data.text_field={fields[0]}"
    if shape_of(fields) is not None:
        hint = "These are conversations or instructions: train on them with `smolctl train chat --data …`."
    return InputError(f"{where}: {reason}; it has {', '.join(map(repr, fields)) or 'no fields'}", hint)


def utf8_size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
