"""The tests' own machinery: which tests run, and that a forked process is as good as a new one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ADDRESS, CHECKOUT, call, start

TESTS = """
import pytest
from hypothesis import given, strategies as st

def test_fast(): ...
@pytest.mark.slow
def test_slow(): ...
@pytest.mark.proof
def test_proof(): ...
@given(st.integers())
def test_property(number): ...
"""


@pytest.fixture
def collected(tmp_path: Path) -> Callable[..., tuple[set[str], str]]:
    """The names of the tests that a command line would run, of one of each kind, and all that it prints."""
    file = tmp_path / "test_kinds.py"
    file.write_text(TESTS)

    def collect(*options: str, name: str = "") -> tuple[set[str], str]:
        configured = ("-p", "tests.conftest", "-c", CHECKOUT / "pyproject.toml", "-n0", "--collect-only")
        done = call(*configured, *options, f"{file}{name}", module="pytest")
        assert done.code == 0, done.out + done.err
        return set(re.findall(r"::test_(\w+)", done.out)), done.out

    return collect


@pytest.mark.slow
def test_each_tier_runs_its_tests_and_says_what_it_leaves_out(
    collected: Callable[..., tuple[set[str], str]],
) -> None:
    fast, said = collected()
    assert fast == {"fast", "property"}
    assert "2 tests were left out. `pytest --rest` runs the slow ones" in said
    assert collected("--rest")[0] == {"slow", "property"}
    assert collected("--all")[0] == {"fast", "slow", "property"}
    assert collected("--proofs")[0] == {"proof", "property"}


@pytest.mark.slow
def test_what_is_named_or_marked_runs_whatever_its_tier(
    collected: Callable[..., tuple[set[str], str]],
) -> None:
    assert collected(name="::test_proof")[0] == {"proof"}
    assert collected("-m", "slow")[0] == {"slow"}
    assert collected("-k", "fast or slow")[0] == {"fast"}


def seen(tmp_path: Path, how: str) -> tuple[int, str, dict[str, Any]]:
    module = "tests.support.self_portrait"
    done = call(how, "--flag", "Größe", module=module, cwd=tmp_path, input="typed")
    return done.code, done.err, json.loads(done.out)


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("exit", 7), ("raise", 1)])
def test_a_forked_process_finds_and_leaves_what_a_new_one_does(
    how: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMETHING", "else")
    forked = seen(tmp_path, how)
    monkeypatch.delenv(ADDRESS, raising=False)
    new = seen(tmp_path, how)
    assert forked[0] == new[0] == code
    assert forked[1].splitlines()[-1:] == new[1].splitlines()[-1:]
    assert forked[2].pop("random") != new[2].pop("random")
    assert forked[2] == new[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_a_forked_process_as_it_ends_a_new_one(number: signal.Signals, tmp_path: Path) -> None:
    process = start("sleep", module="tests.support.self_portrait", stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number


def test_two_forks_draw_different_random_numbers(tmp_path: Path) -> None:
    assert seen(tmp_path, "end")[2]["random"] != seen(tmp_path, "end")[2]["random"]


def test_test_modules_take_nothing_from_each_other() -> None:
    foreign = re.compile(r"^ *(?:from|import) tests(?!\.(?:support|fuzz)\b).*", re.MULTILINE)
    for path in (CHECKOUT / "tests").rglob("test_*.py"):
        assert not foreign.findall(path.read_text()), path
