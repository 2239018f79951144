"""Texts on which two tokenizers differ if they differ anywhere: all of Unicode, whitespace, words of many
languages, spelled special tokens, and chance."""

from __future__ import annotations

import gettext
import random
import sys
import sysconfig
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

# Whitespace of every definition, and what only looks like it.
SPACES = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u180e\u2000\u2003\u200a"
    "\u200b\u200d\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
CONTRACTIONS = ("'s", "'S", "'ſ", "'t", "'RE", "'ve", "'m", "'Ll", "'d", "’s", "''s", "'", "s'")
EMOJI = ("👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "1️⃣", "❤️‍🔥", "🧑🏿‍🚀", "⌚", "©️")
WORDS = (
    "the",
    "Größe",
    "界面",
    "naïve",
    "été",
    "слово",
    "كلمة",
    "คำ",
    "ሰላም",
    "x1y22",
    "३४",
    "Ⅷ½",
    "e\u0301\u0323",
    "…—“",
)


def few(special: Sequence[str]) -> list[str]:
    """Some 150 texts for tests that must be quick."""
    chance = random.Random(0)
    parts = [*SPACES, *CONTRACTIONS, *EMOJI, *WORDS, *special, "<|", "|>", "1", "12345", "a", "\0", "\ud7ff"]
    drawn = ("".join(chance.choices(parts, k=chance.randrange(12))) for _ in range(120))
    return ["", *special, *(f" x {token} \n y{token}z" for token in special), *drawn, "ab" * 3_000]


def many(special: Sequence[str]) -> list[str]:
    """Some five thousand texts, beside `code_points`."""
    return [*few(special), *_spaces(), *_numbers(), *_marks(), *_fuzz(special), *_languages()]


@cache
def _assigned() -> list[str]:
    """Every assigned code point, of the 137,468 for private use some."""
    every = map(chr, range(sys.maxunicode + 1))
    private = map(chr, range(0xE000, sys.maxunicode + 1, 499))
    return [c for c in every if unicodedata.category(c) not in ("Cn", "Cs", "Co")] + [
        c for c in private if unicodedata.category(c) == "Co"
    ]


def code_points() -> Iterator[str]:
    """Every assigned code point beside letters, digits and spaces."""
    assigned = _assigned()
    for start in range(0, len(assigned), 32):
        some = assigned[start : start + 32]
        yield "".join(f"{c}a{c}1{c}  " for c in some)


def _spaces() -> Iterator[str]:
    for run in product(SPACES, repeat=2):
        one = "".join(run)
        yield f"a{one}b{one * 2}1{one}.{one}\n{one}"
    for space in SPACES:
        yield space * 50 + "a" + space * 3


def _numbers() -> Iterator[str]:
    numbers = [c for c in _assigned() if unicodedata.category(c)[0] == "N"]
    for start in range(0, len(numbers), 16):
        yield "".join(f"{c}{c}{c}{c} {c}a1{c}" for c in numbers[start : start + 16])


def _marks() -> Iterator[str]:
    marks = [c for c in _assigned() if unicodedata.category(c)[0] == "M"]
    for start in range(0, len(marks), 16):
        some = marks[start : start + 16]
        yield "".join(f"e{c} {c}е{c}{c}" for c in some)
        yield "e" + "".join(reversed(some))


def _fuzz(special: Sequence[str]) -> Iterator[str]:
    chance = random.Random(1)
    assigned = _assigned()
    parts = [*SPACES, *CONTRACTIONS, *EMOJI, *WORDS, *special, *(token[:-1] for token in special), "<|", "|>"]
    for _ in range(2_000):
        some = [*chance.choices(parts, k=20), *chance.choices(assigned, k=20), *map(chr, range(128))]
        yield "".join(chance.choices(some, k=chance.randrange(60)))


def _languages() -> Iterator[str]:
    """What every Python carries, and the translations that this machine has."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py"))[:40]:
        yield path.read_text(encoding="utf-8", errors="replace")[:2_000]
    for path in sorted((library / "test" / "cjkencodings").glob("*-utf8.txt")):
        yield path.read_text(encoding="utf-8")
    for c in _assigned()[::97]:
        yield f"{unicodedata.name(c, '?')}: {c}, {unicodedata.normalize('NFD', c)}"
    for folder in sorted(Path("/usr/share/locale").glob("*/LC_MESSAGES")):
        for path in sorted(folder.glob("*.mo"))[:3]:
            with path.open("rb") as file, suppress(OSError, ValueError, LookupError):  # some are broken
                translations: Any = gettext.GNUTranslations
                translated: dict[str, str] = vars(translations(file))["_catalog"]
                yield "\n".join(filter(None, translated.values()))[:1_500]
