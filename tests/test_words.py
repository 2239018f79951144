"""Help, messages and docs use the field's words, not private ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from smolctl.cli.main import COMMANDS, application
from tests.support.processes import CHECKOUT, Smolctl

# What was found in them once, with the plain word beside it.
PRIVATE = {
    r"mend(s|ed|ing)?": "correct, fix",
    r"contenders?": "engine",
    r"onlookers?": "observer",
    r"what computes": "engine",
    r"hears?|tells?|told": "gets, says, prints",
    r"(?<!sliding )windows?": "sequence",
    r"passed over|passes over": "repeated, skipped, epoch",
    r"products?": "matmul",
    r"guess(es|ed)?": "draft",
    r"go(es)? on with|stronger still|win back": "continue with, override, save",
}
WORDS = re.compile(rf"(?<![\w-])({'|'.join(PRIVATE)})(?!\w)", re.IGNORECASE)
JSON_VALUES = {"products in "}  # what bench --json has always called the limit; people read "matmul"


def found_in(text: str) -> list[str]:
    """The private words of a text; names of options such as --windows are no words."""
    return [match[0] for match in WORDS.finditer(text)]


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of a source file that a person may read: strings of several words that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    docstrings = {id(node.value) for node in nodes if isinstance(node.value, ast.Constant)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in docstrings:
            continue
        if " " in node.value.strip() and node.value not in JSON_VALUES:
            yield node.lineno, node.value


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_plain_words(command: str, smolctl: Smolctl) -> None:
    text = re.sub(r"\s+", " ", smolctl(*filter(None, [command]), "--help").out)
    assert found_in(re.sub(r"--[\w-]+", "", text)) == []
    assert re.findall(r"<(?:list|str|int|float|path)\b[^>]*>|\{[A-Z]", text) == []  # TEXT, INTEGER, MODEL


def test_the_list_of_commands_has_whole_sentences(smolctl: Smolctl) -> None:
    for line in smolctl("--help").out.partition("Commands:")[2].splitlines()[1:]:
        assert line.endswith("."), line
        assert not line.endswith("..."), line


def test_no_option_is_explained_by_a_fragment() -> None:
    root: Any = typer.main.get_command(application())
    for name, command in root.commands.items():
        for option in command.params:
            assert not re.match(r"(Of|As|For|In|What|When|Also \w+:)\b", option.help or "What"), (
                name,
                option.opts,
            )


def test_messages_have_plain_words() -> None:
    found = [
        f"{path.relative_to(CHECKOUT)}:{line}: {word}: {text[:60]}"
        for path in sorted((CHECKOUT / "smolctl").rglob("*.py"))
        for line, text in messages(path)
        for word in found_in(text)
    ]
    assert found == []


def test_documents_have_plain_words() -> None:
    patterns = ("*.md", "docs/**/*.md", "benchmarks/*.md", "smolctl/**/*.jinja", "configs/*.yaml")
    found = [
        f"{path.relative_to(CHECKOUT)}:{number}: {word}"
        for pattern in patterns
        for path in CHECKOUT.glob(pattern)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word in found_in(line)
    ]
    assert found == []


def test_the_words_are_found_where_they_stand() -> None:
    assert found_in("Mend the YAML; two windows of a contender.") == ["Mend", "windows", "contender"]
    assert found_in("a commended --windows of amendments") == []
