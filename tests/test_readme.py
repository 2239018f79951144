"""README is true: its commands exist and its sessions show what the program prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.processes import Smolctl

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SESSIONS = re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
# Commands whose output is the same on every machine.
EXACT = ("smolctl count-params ", "smolctl inspect-config ", "smolctl --help")


def exact_sessions() -> list[tuple[str, str]]:
    """(command, output) of every command in README that must print the same everywhere."""
    found = []
    for session in SESSIONS:
        for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            if command.startswith(EXACT):
                found.append((command, output))
    return found


@pytest.mark.parametrize(("command", "output"), exact_sessions(), ids=lambda value: str(value)[:40])
def test_sessions_show_what_the_program_prints(command: str, output: str, smolctl: Smolctl) -> None:
    done = smolctl(*command.split()[1:])
    printed = [line.rstrip() for line in done.out.rstrip().splitlines()]
    assert printed == [line.rstrip() for line in output.rstrip().splitlines()]


def test_every_command_has_a_session() -> None:
    shown = set(re.findall(r"^\$ smolctl ([a-z-]+)", "\n".join(SESSIONS), flags=re.MULTILINE))
    assert {"inspect-config", "count-params", "train", "resume", "sample", "bench", "push"} <= shown
    assert len(exact_sessions()) >= 2


def test_the_two_commands_are_there() -> None:
    commands = re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("smolctl train nano")
    assert commands[1].endswith("pytest")
