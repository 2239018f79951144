"""What stands in several files of the repository agrees."""

from __future__ import annotations

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from typing import Any

import pytest
import yaml

from smolctl import __version__
from tests.support.processes import CHECKOUT


def project() -> dict[str, Any]:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text(encoding="utf-8"))
    released = re.findall(r"^## \[(\d.*?)\]", (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert citation["version"] == released[0] == __version__


def test_ci_tests_every_python_that_the_package_names() -> None:
    named = {line.rpartition(":: ")[2] for line in project()["project"]["classifiers"] if ":: 3." in line}
    ci = yaml.safe_load((CHECKOUT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert set(ci["jobs"]["test"]["strategy"]["matrix"]["python"]) == named


def test_the_source_distribution_has_every_file_of_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a checkout of git's")
    included = project()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    always = {"pyproject.toml", ".gitignore"}
    tops = {path.partition("/")[0] for path in listed.stdout.splitlines()} - always
    assert not [top for top in sorted(tops) if not any(fnmatch(top, pattern) for pattern in included)]


def test_one_owner_is_named_everywhere() -> None:
    """The placeholder, or the account that takes its place."""
    paths = (path for pattern in ("*.*", ".github/**/*.*", "docs/**/*.md") for path in CHECKOUT.glob(pattern))
    texts = (path.read_text(encoding="utf-8") for path in paths if path.is_file())
    assert (
        len(
            {
                owner
                for text in texts
                for owner in re.findall(
                    r"(?<=github\.com/)[\w-]+(?=/smolctl)|[\w-]+(?=\.github\.io/smolctl)", text
                )
            }
        )
        == 1
    )


@pytest.mark.parametrize("path", sorted((CHECKOUT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_templates_are_yaml_with_a_time_limit(path: Any) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, job in content.get("jobs", {}).items():
        assert "uses" in job or "timeout-minutes" in job, name
