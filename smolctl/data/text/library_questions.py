"""Questions and answers from the docstrings of Python's standard library: the built-in conversations, for
chat fine-tuning without your own data.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import itertools
import math
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from smolctl.data.text.documents import OnRead
from smolctl.data.text.python_library import library_files, library_root

# Commonly used modules without Python source.
_COMPILED = (builtins, math, itertools, time)
_LEFT_OUT = {
    "idlelib",
    "lib2to3",
    "ensurepip",
    "distutils",
}  # applications, and modules that newer versions removed
_PHRASINGS = {
    "function": (
        "What does {name} do?",
        "Explain {name}.",
        "What is {name} for?",
        "Say what {name} does in Python.",
    ),
    "class": (
        "What is {name}?",
        "Explain the class {name}.",
        "What is {name} for?",
        "Describe {name} in Python.",
    ),
    "module": (
        "What is the module {name} for?",
        "Explain the module {name}.",
        "What is in Python's {name}?",
        "Describe the Python module {name}.",
    ),
}
PHRASINGS_EACH = 2  # of an object's four: the others are never trained on
SHORTEST, LONGEST = 20, 400  # characters of an answer
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z`'\"(][^\n]*[a-z]{2}[^\n]*", re.DOTALL)


def library_questions(on_read: OnRead) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A row of `messages` for every question, and its origin.

    Questions about one object have the same `group`, so they are held out together.
    """
    for path in library_files():
        name = path.relative_to(library_root()).with_suffix("").as_posix().replace("/", ".")
        name = name.removesuffix(".__init__")
        on_read(path.stat().st_size)
        if _is_public(name) and name.split(".")[0] not in _LEFT_OUT:
            yield from _rows(_in_source(path, name))
    for module in _COMPILED:
        yield from _rows(_in_module(module))


def _rows(documented: Iterator[tuple[str, str, str]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    seen = set()
    for name, kind, docstring in documented:
        if name in seen or not (answer := _answer(docstring)):
            continue  # an object defined twice in a module, as for two systems, has two answers
        seen.add(name)
        phrasings = _PHRASINGS[kind]
        first = hashlib.blake2b(name.encode(), digest_size=1).digest()[0]
        for number in range(first, first + PHRASINGS_EACH):
            question = phrasings[number % len(phrasings)].format(name=name)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield f"python: {name}", {"messages": turns, "group": name}


def _in_source(path: Path, module: str) -> Iterator[tuple[str, str, str]]:
    """Name, kind and docstring of a module and of its objects."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, SyntaxError, OSError):
        return
    if docstring := ast.get_docstring(tree):
        yield module, "module", docstring
    yield from _in_body(tree.body, module)


def _in_body(body: list[ast.stmt], before: str) -> Iterator[tuple[str, str, str]]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if not _is_public(node.name):
            continue
        name, kind = f"{before}.{node.name}", "class" if isinstance(node, ast.ClassDef) else "function"
        if docstring := ast.get_docstring(node):
            yield name, kind, docstring
        if isinstance(node, ast.ClassDef):
            yield from _in_body(node.body, name)


def _in_module(module: ModuleType) -> Iterator[tuple[str, str, str]]:
    for name, item in sorted(vars(module).items()):
        docstring = getattr(item, "__doc__", None)
        if _is_public(name) and callable(item) and isinstance(docstring, str):
            shown = name if module is builtins else f"{module.__name__}.{name}"
            yield shown, "class" if isinstance(item, type) else "function", docstring


def _is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def _answer(docstring: str) -> str:
    """As many sentences of the first paragraph of prose as fit; empty if there is none."""
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        text = " ".join(paragraph.split())
        if not _PROSE.fullmatch(text) or ">>>" in text or not text.isascii():
            continue
        answer = ""
        for sentence in _SENTENCE.split(text):
            if len(answer) + len(sentence) > LONGEST:
                break
            answer = f"{answer} {sentence}".strip()
        if len(answer) >= SHORTEST:
            return answer if answer.endswith((".", "!", "?")) else f"{answer}."
    return ""
