"""The threads of the compiled engine wait without taking a core from others for long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from smolctl.native import build


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the state of threads in /proc")
def test_a_thread_that_waits_long_at_a_barrier_sleeps(tmp_path: Path) -> None:
    """In a container with a quota, what it spins is taken from the thread that it waits for."""
    if not build.compilers():
        pytest.skip("there is no C compiler")
    program, source = tmp_path / "late", Path(__file__).with_name("late.c")
    compiler = build.compilers()[-1]  # the system's, where there is one: faster
    subprocess.run([*compiler, "-std=gnu11", "-O1", "-pthread", source, "-o", program], check=True)
    assert subprocess.run([program]).returncode == 0
