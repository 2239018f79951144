"""Help, messages and docs use the field's words, not private ones."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel

from smolctl.cli.main import COMMANDS, application
from smolctl.config.run import RunConfig
from tests.support.processes import CHECKOUT, Smolctl

# What was found in them once, with the plain word beside it.
PRIVATE = {
    r"mend(s|ed|ing)?": "correct, fix",
    r"contenders?": "engine",
    r"onlookers?": "observer",
    r"what computes": "engine",
    r"hears?|tells?|told": "gets, says, prints",
    r"(?<!sliding )(?-i:windows?)": "sequence",  # Windows is a system
    r"passed over|passes over": "repeated, skipped, epoch",
    r"(?<!dot )products?": "matmul",
    r"guess(es|ed)?": "draft",
    r"go(es)? on with|stronger still|win back": "continue with, override, save",
    r"(tokens|sequences|bits|nats|values|objects?|bytes|numbers) an? "
    r"(token|step|sequence|second|parameter|line|head|answer|weight|value|call)": "tokens per step",
    r"(?<!there )(?:is|are) no (?!longer|larger|more|better|worse|smaller)\w+": "is not a",
    r"anew|exclude each other|something else than|so many": "again, cannot be combined, other than",
    r"cannot be a GGUF|(?:not|is) taken, because|is there already|no \w+ in it": "refused, exists, contains",
    r"answers? with nothing|another way than|all the same|by heart|stands? alone": "anyway",
    r"licences?": "license, as the Hub and the option spell it",
    r"ours": "smolctl's; chosen, for a value of a config",
    r"do(?:es)? not divide(?: by)?|stays? so": "is not divisible by, does not change",
    r"in company|be had": "in a batch, is available",
}
WORDS = re.compile(rf"(?<![\w-])({'|'.join(PRIVATE)})(?!\w)", re.IGNORECASE)
# Words that code does not do, in docstrings and comments; windows and products are terms of the code there.
VERBS = re.compile(
    r"(?<![\w-])(mend(s|ed|ing)?|contenders?|onlookers?|hears?|tells?|told|passe[ds] over|what computes|"
    r"go(es)? on with|stronger still|win back|nats a token|anew|"
    r"something else than|in company|be had|at hand|goes along|lies? beside|anybody)(?!\w)",
    re.IGNORECASE,
)
JSON_VALUES = {"products in "}  # what bench --json has always called the limit; people read "matmul"


def found_in(text: str) -> list[str]:
    """The private words of a text; names of options such as --windows are no words."""
    return [match[0] for match in WORDS.finditer(text)]


@cache
def texts() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What the source says, each with its place: to people, in strings of several words; in docstrings and
    comments.
    """
    messages, remarks = [], []
    for path in sorted((CHECKOUT / "smolctl").rglob("*.py")):
        source, name = path.read_text(encoding="utf-8"), path.relative_to(CHECKOUT)
        docstrings: set[int] = set()
        for node in ast.walk(ast.parse(source)):  # a statement comes before its parts
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                docstrings.add(id(node.value))
                remarks.append((f"{name}:{node.lineno}", str(node.value.value)))
            elif isinstance(node, ast.Constant) and id(node) not in docstrings:
                messages.append((f"{name}:{node.lineno}", str(node.value)))
        for number, line in enumerate(source.splitlines(), 1):
            if (comment := re.search(r"(?:^|\s)# .*", line)) is not None:
                remarks.append((f"{name}:{number}", comment[0]))
    for path in sorted(one for one in (CHECKOUT / "smolctl").rglob("*") if one.suffix in (".js", ".c", ".h")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if (comment := re.search(r"(?:^\s*\*|/\*|(?<!:)//).*", line)) is not None:
                remarks.append((f"{path.relative_to(CHECKOUT)}:{number}", comment[0]))
    people_read = [one for one in messages if " " in one[1].strip() and one[1] not in JSON_VALUES]
    return people_read, remarks


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


def test_no_setting_is_explained_by_a_fragment() -> None:
    sections = [field.annotation for field in RunConfig.model_fields.values()]
    fields = {
        f"{section.__name__}.{key}": field.description or ""
        for section in sections
        if isinstance(section, type) and issubclass(section, BaseModel)
        for key, field in section.model_fields.items()
    }
    comments = {
        f"{path.name}:{number}": line.partition("  # ")[2]
        for path in (CHECKOUT / "configs").glob("*.yaml")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    }
    assert len(fields) > 60
    fragment = re.compile(r"(of|as|on|at|in|from|where|what|which|times|steps; |steps, or )\b|\[|steps?$")
    assert [one for one in (fields | comments).items() if fragment.match(one[1])] == []


def test_messages_have_plain_words() -> None:
    assert [f"{place}: {word}: {text[:60]}" for place, text in texts()[0] for word in found_in(text)] == []


def test_docstrings_and_comments_have_plain_verbs() -> None:
    assert [f"{place}: {match[0]}" for place, text in texts()[1] for match in VERBS.finditer(text)] == []


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
