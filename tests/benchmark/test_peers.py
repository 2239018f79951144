"""The processes that benchmarks/decode.py measures, and the table of what it has found."""

from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from docs.peer_table import peer_table

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
ENGINE = """
import sys
sys.path.insert(0, {peers!r})
import serve_engine

def load(model, threads):
    def run(tokens, prompt, file):
        print("what a library prints")
        if file:
            raise RuntimeError("no logits\\nof this")
        return sum(map(sum, tokens)) + prompt / 10
    return run

serve_engine.main(load, "1.2.3")
"""


def engine(rates: dict[str, list[float]], bits: int = 8, kl: float | None = 0.001) -> dict[str, Any]:
    return {"bits": bits, "version": "1.2", "settings": "", "kl": kl, "rates": rates}


def results(**engines: dict[str, Any]) -> dict[str, Any]:
    return {
        "date": "2026-11-26",
        "machine": "a CPU",
        "threads": 2,
        "model": "model.gguf",
        "smolctl": "abc of 2026-11-26",
        "left_out": ["slow int8, decode: a run takes 20 s"],
        "engines": engines,
    }


FOUND = results(
    **{
        "smolctl int8": engine({"decode": [100.0] * 6, "prefill 512": [900.0] * 6}),
        "faster q8_0": engine({"decode": [125.0] * 6, "prefill 512": [300.0] * 6}, kl=None),
        "noisy q8_0": engine({"decode": [90.0, 120.0, 130.0, 115.0, 120.0, 125.0]}),
        "other q4_0": engine({"decode": [500.0] * 6}, bits=4),
    }
)


def test_the_table_says_where_a_peer_of_the_same_bits_is_faster() -> None:
    table = peer_table(FOUND)
    assert "- decode: faster q8_0 is 1.25 times as fast as smolctl int8." in table
    assert "| smolctl int8 / faster q8_0 | **0.80** (0.80–0.80) | **3.00** (3.00–3.00) |" in table
    assert "| faster q8_0 | 1.2 | 125 | 300 |  |" in table
    assert table.count("times as fast") == 1  # one is within noise, one has other bits
    assert "- Not measured: slow int8, decode: a run takes 20 s." in table


@pytest.mark.parametrize(("day", "marked"), [(date(2027, 2, 24), False), (date(2027, 2, 25), True)])
def test_results_older_than_90_days_are_marked(day: date, marked: bool) -> None:
    assert ("days old" in peer_table(FOUND, day)) is marked


def test_where_none_is_faster_the_table_says_so() -> None:
    table = peer_table(
        results(**{"smolctl int8": engine({"decode": [1.0]}), "slow q8_0": engine({"decode": [0.5]})})
    )
    assert "- No peer is faster, beyond noise, at the same bits." in table


def test_an_engine_answers_line_by_line(tmp_path: Path) -> None:
    """Its version, the seconds of a run, and the reason where it cannot; nothing that libraries print."""
    script = tmp_path / "engine.py"
    script.write_text(ENGINE.format(peers=str(PEERS)))
    asked = "1 - 1,2 3,4\n1 logits 1,2\n2 - 5,6\n"
    done = subprocess.run(
        [sys.executable, "-S", script, "serve", "model", "2"], input=asked, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["1.2.3", "10.1", "! no logits", "11.2"]
