"""Scans files for secrets before they are published. It reports places, but never the secrets."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from smolctl.errors import InputError
from smolctl.publish.secret_rules import (
    CONTEXTS,
    LONGEST_NAME,
    NAME_BEFORE,
    NAMES,
    TOKEN,
    TOKENS,
    VALUE,
    Rule,
)
from smolctl.sources.gguf.header import GGUF_MAGIC, read_header
from smolctl.sources.huggingface.safetensors_file import is_safetensors

SECRET_VARIABLE = re.compile(r"TOKEN|KEY|SECRET|PASS|PWD|CREDENTIAL|AUTH|COOKIE|DSN", re.IGNORECASE)
SHORTEST_VALUE = 16  # of an environment variable: shorter values occur in ordinary text
SHORTEST_PASSWORD = 8
PIECE, OVERLAP = 8 << 20, 8 << 10  # bytes that are searched together, and the overlap of consecutive pieces
# Placeholders in the place of a secret.
PLACEHOLDER = re.compile(
    r"(?i)[*.x#-]+|[<{$%@].*|.*(?:example|placeholder|changeme|change_me|redacted|dummy|your[_-]).*|"
    r"(?:my|the|some|an?)?[_-]?(?:user(?:name)?|passw(?:or)?d|pass|pwd|secret|token|key|none|null|true|false|"
    r"undefined|anonymous)\d?"
)
NOT_RANDOM = re.compile(
    r"[./~].*|.*://.*|.*\d{4}-\d\d-\d\d.*|v?\d+(?:\.\w+)+|.*\.(?:py|json|txt|md|ya?ml|jinja)"
)
FILE_NAME = re.compile(r".+\.(?:json|txt|md|py|jinja|safetensors|gguf|ya?ml|png|model|ckpt|so|c|h|bin)")
WORD = re.compile(r"[A-Za-z]+\d{0,3}|\d+[A-Za-z]{0,2}|[vV]\d+")
ESCAPED = re.compile(r"\\([nrt\"'/])")  # in a string of JSON or of source code
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")  # two characters on average in random text
LONGEST_MEAN = 4  # characters: if the mean is longer, the text consists of words
LEAST_ENTROPY = 2.8  # bits per character of random text; eight distinct characters have 3
LETTERS, DIGITS = re.compile(r"[A-Za-z]"), re.compile(r"\d")


@dataclass(frozen=True)
class Finding:
    """The place of a possible secret."""

    path: str
    line: int  # starting at 1; 0: the file itself
    kind: str
    hash: str  # start of the SHA-256 of the finding, with which the user can allow it

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else self.path
        return f"{place}: {self.kind} [{self.hash}]"


def scan(folder: Path, paths: Iterable[str]) -> tuple[Finding, ...]:
    """Everything in the files of a folder that looks like a secret.

    Every byte is read as a character, because secrets are ASCII in every encoding and kind of file. Of
    weights only the header is searched, because their numbers contain no text.
    """
    values = _secret_values()
    findings: list[Finding] = []
    for path in paths:
        file = folder / path
        if NAMES.fullmatch(Path(path).name.lower()):
            findings.append(Finding(path, 0, "a file of secrets by its name", _hash(file.read_bytes())))
        known: set[tuple[int, str]] = set()
        for first_line, text in _texts(file):
            for start, kind, secret in _found(text, values):
                line = first_line + text.count("\n", 0, start)
                finding = Finding(path, line, kind, _hash(secret.encode("latin-1")))
                if (finding.line, finding.hash) not in known:  # in the overlap of two pieces
                    known.add((finding.line, finding.hash))
                    findings.append(finding)
    return tuple(findings)


def _hash(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()[:12]


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """A file in pieces of text, each with the number of its first line.

    Without NUL bytes, UTF-16 and UTF-32 become ASCII; with spaces in their place, the strings in a program or
    a picture remain separate.
    """
    line, left = 1, _bytes_to_search(file)
    before = b""
    with file.open("rb") as opened:
        while left > 0 and (piece := opened.read(min(PIECE, left))):
            left -= len(piece)
            data = before + piece
            if b"\0" in data:
                yield line, data.translate(None, b"\0").decode("latin-1")
                data = data.replace(b"\0", b" ")
            yield line, ESCAPED.sub(_unescaped, data.decode("latin-1"))
            before = data[-OVERLAP:]
            line += data.count(b"\n", 0, len(data) - len(before))


def _unescaped(match: re.Match[str]) -> str:
    """The character of an escape; for a line end a second space, so that lines can be counted."""
    return match[1] if match[1] in "\"'/" else "\t"


def _bytes_to_search(file: Path) -> int:
    """The bytes of a file that can contain text: all of it, but of weights only the header."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(512)
    if is_safetensors(start):
        return min(size, 8 + int.from_bytes(start[:8], "little"))
    if start.startswith(GGUF_MAGIC):
        try:
            return min((tensor.offset for tensor in read_header(file).tensors), default=size)
        except InputError:
            return size
    return size


def _found(text: str, values: Mapping[str, str]) -> Iterator[tuple[int, str, str]]:
    """Start, kind and text of each possible secret; no part is reported twice."""
    spans: list[tuple[int, int]] = []
    for start, kind, secret in itertools.chain(
        _values_in(text, values),
        _tokens_in(text),
        _matches(text, CONTEXTS),
        _assigned_in(text),
    ):
        end = start + len(secret)
        if not any(start < stop and begin < end for begin, stop in spans):
            spans.append((start, end))
            yield start, kind, secret


def _values_in(text: str, values: Mapping[str, str]) -> Iterator[tuple[int, str, str]]:
    for name, value in values.items():
        start = text.find(value)
        while start >= 0:
            yield start, f"the value of {name}", value
            start = text.find(value, start + len(value))


def _tokens_in(text: str) -> Iterator[tuple[int, str, str]]:
    """Secrets with a format of their own, searched in the long tokens without spaces."""
    pieces = [(match.start(), match[0]) for match in TOKEN.finditer(text)]
    places = list(itertools.accumulate((len(piece) + 1 for _, piece in pieces), initial=0))
    for place, kind, secret in _matches(" ".join(piece for _, piece in pieces), TOKENS):
        index = bisect.bisect_right(places, place) - 1
        yield pieces[index][0] + place - places[index], kind, secret


def _matches(text: str, rules: Iterable[Rule]) -> Iterator[tuple[int, str, str]]:
    lowered = text.lower()
    for rule in rules:
        if not any(hint in lowered for hint in rule.hints):
            continue
        for match in rule.pattern.finditer(text):
            group = 1 if match.re.groups and match[1] is not None else 0
            is_dummy = group == 1 and PLACEHOLDER.fullmatch(match[1]) is not None
            if not is_dummy and _entropy(match[group]) >= rule.entropy:
                yield match.start(group), rule.kind, match[group]


def _assigned_in(text: str) -> Iterator[tuple[int, str, str]]:
    """Values assigned to names such as `api_key` or `password`."""
    for match in VALUE.finditer(text):
        value = match["value"]
        is_mixed = bool(DIGITS.search(value) and LETTERS.search(value))
        if not is_mixed or PLACEHOLDER.fullmatch(value) or NOT_RANDOM.fullmatch(value):
            continue
        before = text[max(0, match.start() - LONGEST_NAME) : match.start()]
        named = NAME_BEFORE.search(before)
        is_called = not match["quote"] and text[match.end() : match.end() + 1] in ("(", "[")
        if named is None or is_called or FILE_NAME.fullmatch(named["name"].lower()):
            continue
        if is_random(value) or _is_password(named, match):
            yield match.start("value"), "secret that is assigned", value


def _is_password(named: re.Match[str], given: re.Match[str]) -> bool:
    """Whether a short value of letters and digits is a password, and not a part of a program."""
    name = named["name"]
    if not re.search("pass|pwd|secret", name, re.IGNORECASE) or len(given["value"]) < SHORTEST_PASSWORD:
        return False
    before, after = named.string[: named.start()], given.string[given.end() : given.end() + 1]
    is_a_line = not before.rpartition("\n")[2].strip() and after in ("", "\n", "\r")
    return bool(given["quote"]) or name.isupper() or is_a_line


def is_random(value: str) -> bool:
    """Whether a text of letters and digits is random: long, mixed, and without words."""
    if len(value) < SHORTEST_VALUE or NOT_RANDOM.fullmatch(value):
        return False
    if not (DIGITS.search(value) and LETTERS.search(value)):
        return False
    parts = [part for part in re.split(r"[^A-Za-z0-9]+", value) if part]
    words = WORDS.findall(value)
    if all(WORD.fullmatch(part) for part in parts) or sum(map(len, words)) > LONGEST_MEAN * len(words):
        return False
    return _entropy(value) >= LEAST_ENTROPY


def _entropy(text: str) -> float:
    """Shannon entropy, in bits per character."""
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts) if text else 0.0


def _secret_values() -> dict[str, str]:
    """Secrets in this process's environment, under any name, and the saved Hub token."""
    from huggingface_hub import get_token

    values = {name: value for name, value in os.environ.items() if _may_be_secret(name, value)}
    token = get_token()
    if token and len(token) >= SHORTEST_PASSWORD and token not in values.values():
        values["the Hub token"] = token
    return {name: value.encode(errors="surrogateescape").decode("latin-1") for name, value in values.items()}


def _may_be_secret(name: str, value: str) -> bool:
    """Whether a variable contains a secret: by its name, or because its value is random."""
    if any(character.isspace() for character in value) or PLACEHOLDER.fullmatch(value):
        return False
    if not SECRET_VARIABLE.search(name):
        return is_random(value)
    if NOT_RANDOM.fullmatch(value):  # a path or a server address
        return False
    is_mixed = bool(DIGITS.search(value) and LETTERS.search(value))
    return len(value) >= SHORTEST_VALUE or (len(value) >= SHORTEST_PASSWORD and is_mixed)
