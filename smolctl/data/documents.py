"""A document, and where a long one may be cut without changing a single token."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

# Small pieces keep an encoder's working set in the CPU's cache and spread evenly over the cores.
PIECE = 16 * 1024  # characters
LONGEST_PIECE = 1024 * 1024  # characters; a stretch without a safe place is cut here anyway

# After a newline that stands alone between two characters that are neither white space nor marks.
#
# Byte-level BPE merges within the matches of a regex only, so a cut is safe where a match ends
# whatever follows, and where what follows does not look back. GPT-2's regex (SmolLM's too, after
# splitting digits off) is 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+.
# Before the newline every alternative for the visible character x ends, as none of them goes on
# over "\n". The newline itself is no "optional space". `\s+(?!\S)` cannot match it in the whole
# text, as a visible character follows, but then `\s+` takes it; at the end of a piece `\s+(?!\S)`
# does. Either way "\n" is a match of its own. The next match starts after it, and no alternative
# looks back. Two newlines, or a newline and a space, would be divided differently: not safe.
# Newer regexes end a run of punctuation with `[\r\n]*`, which is why the cut is after the newline.
_SAFE_CUT = re.compile(r"(?<=[\w!-~]\n)(?=[\w!-~])")
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
