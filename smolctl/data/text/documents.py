"""A document, and where a long one may be cut without changing a single token."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from smolctl.errors import InputError

# Small pieces keep an encoder's working set in the CPU's cache and spread evenly over the cores.
PIECE = 16 * 1024  # characters
LONGEST_PIECE = 1024 * 1024  # characters; a stretch without a safe place is cut here anyway

# After a single newline, or before a single space, between two visible characters (no white space,
# no mark that joins the character before it).
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
_SAFE_CUT = re.compile(r"(?<=[\w!-~]\n)(?=[\w!-~])|(?<=[\w!-~])(?= [\w!-~])")
_LAST_SPACE = re.compile(r"\s\S*\Z")

# Told how many more bytes of a source were read.
OnRead = Callable[[int], None]


@dataclass(frozen=True)
class Document:
    """One text; its pieces, concatenated, are the whole of it. They can be iterated once."""

    name: str
    pieces: Iterator[str]


def cut(chunks: Iterable[str], size: int = PIECE, longest: int = LONGEST_PIECE) -> Iterator[str]:
    """Cut a text into pieces of about `size` characters that tokenize as the whole does.

    Args:
        chunks: the text, in parts of any length.
        size: a piece ends at the first safe place after so many characters.
        longest: without a safe place a piece ends here, at white space if there is any near.
    """
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        start = 0
        while end := _end_of_piece(buffer, start, size, longest):
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def no_text(where: str, reason: str, names: Iterable[str]) -> InputError:
    """What is said of a row whose text cannot be found among its fields or columns."""
    return InputError(
        f"{where}: {reason}; it has {', '.join(map(repr, names)) or 'no fields'}",
        "Set data.text_field to the field or column that holds the text.",
    )


def utf8_size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _end_of_piece(text: str, start: int, size: int, longest: int) -> int:
    """Where the piece that begins at `start` ends, or 0 when more text must be seen first."""
    safe = _SAFE_CUT.search(text, start + size, start + longest)
    if safe:
        return safe.end()
    if len(text) - start < longest:
        return 0
    stop = start + longest
    space = _LAST_SPACE.search(text, max(start + 1, stop - size), stop)
    return space.start() if space else stop
