"""README and docs are true: what they show is what the program prints, and what they name exists."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from docs.regenerate import BLOCK, COMMON, EXACT, PAGES, command_lines, options, updated
from smolctl.cli.main import COMMANDS
from smolctl.config import load_run_config
from smolctl.runs.events import Checkpoint, End, Note, Prediction, Start, Step, Validation
from smolctl.serving.serve import Ready
from smolctl.training.verify import Verification
from tests.support.processes import CHECKOUT, Smolctl

README = CHECKOUT / "README.md"
DOCS = CHECKOUT / "docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_pages_show_what_the_program_prints(page: Path, smolctl: Smolctl) -> None:
    shown = page.read_text(encoding="utf-8")
    assert updated(shown, lambda line: smolctl(*line.split()[1:]).out) == shown, "run docs/regenerate.py"


def test_every_command_has_a_page_with_its_options_and_a_session() -> None:
    for command in COMMANDS:
        page = (DOCS / "commands" / f"{command}.md").read_text(encoding="utf-8")
        assert f"<!-- options of {command} -->" in page
        assert f"\n$ smolctl {command}" in page
        rows = set(re.findall(r"^\| (?:`|<code>)(--?[\w-]+)", page, re.MULTILINE))
        flags = {name.split()[0].strip(",") for name, _ in options(command) if name not in COMMON}
        assert {flag for flag in flags if flag.startswith("-")} <= rows
        assert f"docs/commands/{command}.md" in README.read_text(encoding="utf-8")
    shown = list(command_lines(README.read_text(encoding="utf-8")))
    assert any(f"{line} ".startswith(EXACT) for line in shown)


def test_every_option_of_a_shown_command_exists() -> None:
    wrong = []
    for page in PAGES:
        for line in command_lines(page.read_text(encoding="utf-8")):
            command, *words = shlex.split(line.removeprefix("smolctl "))
            if command not in COMMANDS:
                assert command.startswith("-"), f"{page}: {line}"
                continue
            known = set(re.findall(r"(?<!\w)--?[\w-]+", " ".join(name for name, _ in options(command))))
            wrong += [
                f"{page}: {line}: {word}"
                for word in words
                if re.match("--?[a-z]", word) and word not in known
            ]
    assert wrong == []


def test_the_steps_of_nano_that_pages_and_help_name_are_kept_when_it_ends(smolctl: Smolctl) -> None:
    config = load_run_config("nano")
    end = config.train.steps + 50  # the tutorial adds as many
    # Each validation may be the best so far, and be saved.
    saved = {*range(0, end, config.checkpoint.every), *range(0, end, config.validation.every), end}
    kept = sorted({*saved, config.train.steps})[-config.checkpoint.keep_last :]
    pages = {page.name: BLOCK.sub("", page.read_text(encoding="utf-8")) for page in PAGES}
    for name, text in {**pages, **{one: smolctl(one, "--help").out for one in COMMANDS}}.items():
        assert {int(step) for step in re.findall(r"runs/nano-001@(\d+)", text)} <= {*kept}, name


@pytest.mark.parametrize("command", ["inspect-config", "inspect-config --against", "count-params"])
def test_keys_of_json_are_documented(command: str, smolctl: Smolctl) -> None:
    page = (DOCS / "json.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{command}` \| (.*) \|$", page, re.MULTILINE)
    other = ["smollm2-135m"] if "--against" in command else []
    document = smolctl(command.split()[0], "nano", *command.split()[1:], *other, "--json").json
    assert re.findall(r"`(\w+)`", row) == list(document)


def test_keys_of_events_are_documented() -> None:
    page = (DOCS / "json.md").read_text(encoding="utf-8")
    rows = {
        name: re.findall(r"`(\w+)`", keys)
        for name, keys in re.findall(r"^\| `(\w+)`.* \| (.*) \|$", page, re.M)
    }
    for kind in (Note, Start, Step, Prediction, Validation, Checkpoint, End):
        assert rows[kind.event] == [field.name for field in fields(kind)]
    assert rows["verification"] == [*(field.name for field in fields(Verification)), "exact"]
    assert rows["ready"] == [field.name for field in fields(Ready) if field.name != "notes"]


def test_links_lead_to_files_and_headings_that_exist() -> None:
    headings = {page: _anchors(page) for page in PAGES}
    wrong = []
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists() or (anchor and anchor not in headings[file]):
                wrong.append(f"{page.relative_to(CHECKOUT)}: {target}")
    assert wrong == []


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs both make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short_and_has_the_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    install_and_train, install_and_test = re.findall(r"^python3 -m venv .*$", text, re.MULTILINE)[-2:]
    assert install_and_train.endswith("smolctl train nano")
    assert install_and_test.endswith("pytest")
