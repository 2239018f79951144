"""A few damaged inputs of every kind in each tier; `python -m tests.fuzz` runs as many as asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.fuzz import harness
from tests.fuzz.harness import run_cases
from tests.fuzz.inputs import base
from tests.fuzz.kinds import KINDS

pytestmark = [
    pytest.mark.skipif("sys.platform != 'linux'", reason="children are limited as Linux limits them"),
    pytest.mark.xdist_group("fuzz"),  # the valid inputs are made once
]


def all_end_well(numbers: Iterable[int]) -> None:
    base()
    outcome = run_cases(list(KINDS.items()), list(numbers))
    found = "\n".join(f"python -m tests.fuzz {finding.name}: {finding.what}" for finding in outcome.findings)
    assert not found, found
    refused = {count.split(" ")[0] for count in outcome.counts if count.endswith(" refused")}
    assert len(refused) > len(KINDS) / 2, "the inputs are damaged"


def test_damaged_inputs_end_in_an_error_of_ours_or_in_a_result() -> None:
    all_end_well(range(6))


@pytest.mark.slow
def test_many_damaged_inputs_end_well() -> None:
    all_end_well(range(1_000, 1_030))


@pytest.mark.proof
def test_a_hundred_thousand_damaged_inputs_end_well() -> None:
    all_end_well(range(100_000 // len(KINDS)))


def _hang() -> None:
    while True:
        pass


def _swallow() -> None:
    bytearray(3_000_000_000)


def _write() -> None:
    Path("/tmp/smolctl-fuzz-outside").touch()


def _crash() -> None:
    import ctypes

    ctypes.string_at(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "what"), [(_hang, "hang"), (_swallow, "MemoryError"), (_write, "outside"), (_crash, "killed by")]
)
def test_the_harness_names_what_goes_wrong(
    act: Callable[[], None], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "SECONDS", 0.5)

    def case(chance: random.Random, folder: Path) -> Iterable[Callable[[], object]]:
        return (act if chance.random() < 0.5 else str,)

    outcome = run_cases([("case", case)], range(4))
    Path("/tmp/smolctl-fuzz-outside").unlink(missing_ok=True)
    assert sum(outcome.counts.values()) == 4
    assert outcome.findings
    assert all(what in finding.what for finding in outcome.findings)
