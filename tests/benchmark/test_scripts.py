"""The scripts in benchmarks/ stand on the package alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The top-level names of everything that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_imports_from_the_tests(path: Path) -> None:
    assert "tests" not in imported(path)


def test_no_test_imports_from_the_scripts() -> None:
    scripts = {"benchmarks", *(path.stem for path in SCRIPTS)}
    assert {path.name: imported(path) & scripts for path in TESTS if imported(path) & scripts} == {}
