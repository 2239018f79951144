"""How many cores a process may use, and how its threads wait beside other processes."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from smolctl import cores
from smolctl.cores import (
    compute_threads,
    computing_cores,
    cpu_quota,
    sharing_cores,
    usable_cores,
    usable_cpus,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="control groups and libgomp are Linux's")


def write(files: dict[str, str], root: Path) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/", {"cpu.max": ""}, math.inf),
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/docker/of-the-host", {"cpu.max": "200000 100000"}, 2.0),
        (
            "4:cpu,cpuacct:/a\n0::/",
            {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        (
            "4:cpu:/x",
            {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            4.0,
        ),
        ("1:cpuset:/", {"cpu.max": "max 0"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_the_processors_of_a_container_are_counted_by_its_quota(
    groups: str, files: dict[str, str], expected: float, tmp_path: Path
) -> None:
    write({f"sys/fs/cgroup/{name}": text for name, text in files.items()}, tmp_path)
    write({"proc/self/cgroup": groups}, tmp_path)
    assert cpu_quota(tmp_path) == expected


@pytest.mark.parametrize(
    ("asked", "variable", "expected"),
    [
        (1, "", 1),
        (100_000, "", 6),
        (None, "3", 3),
        (None, "3,2", 3),
        (None, "100000", 6),
        (None, "none", 2),
        (None, "0", 2),
        (None, None, 2),
    ],
)
def test_threads_are_those_asked_for_but_no_more_than_processors(
    asked: int | None, variable: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable_cpus", lambda: 6)
    monkeypatch.setattr(cores, "computing_cores", lambda _root: 3)
    monkeypatch.setattr(cores, "usable_cores", lambda _root: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert compute_threads(asked) == expected


def processors(siblings: str, **files: str) -> dict[str, str]:
    """Files of processors 0, 1, …: to which core each belongs, and what else is written about them."""
    places = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{core}\n"
        for cpu, core in enumerate(siblings)
    }
    for name, values in files.items():
        places |= {
            f"sys/devices/system/cpu/cpu{cpu}/{name}": f"{value}\n"
            for cpu, value in enumerate(values.split())
        }
    return places


EIGHT = processors("abcdefgh")
QUOTA_V1 = {
    "proc/self/cgroup": "4:cpu,cpuacct:/\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
}


@linux
@pytest.mark.parametrize(
    ("files", "allowed", "expected"),
    [
        pytest.param({}, range(8), 8, id="nothing is known"),
        pytest.param(EIGHT, range(8), 8, id="alike"),
        pytest.param(EIGHT, {1, 6}, 2, id="affinity"),
        pytest.param(processors("abcdabcd"), range(8), 4, id="siblings"),
        pytest.param(processors("abcdabcd"), {0, 1, 4}, 2, id="siblings and affinity"),
        pytest.param(
            processors("aabbccdd") | {"sys/devices/cpu_atom/cpus": "\n"}, range(8), 4, id="no slow ones"
        ),
        pytest.param(
            processors("aabbccdefg") | {"sys/devices/cpu_atom/cpus": "6-9"}, range(10), 7, id="many slow"
        ),
        pytest.param(processors("abcdef") | {"sys/devices/cpu_atom/cpus": "4,5"}, range(6), 4, id="few slow"),
        pytest.param(processors("abcdef") | {"sys/devices/cpu_atom/cpus": "4-5"}, {4, 5}, 2, id="only slow"),
        pytest.param(processors("abcd", cpu_capacity="300 300 1024 1024"), range(4), 2, id="big and little"),
        pytest.param(processors("abcd", cpu_capacity="800 800 1024 1024"), range(4), 4, id="a little slower"),
        pytest.param(processors("abcd", cpu_capacity="? ? ? ?"), range(4), 4, id="no number"),
        pytest.param(
            EIGHT | {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "100000 100000"},
            range(8),
            1,
            id="quota 2",
        ),
        pytest.param(
            EIGHT | QUOTA_V1 | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000"},
            range(8),
            2,
            id="quota 1",
        ),
        pytest.param(
            processors("aabb") | {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "300000 100000"},
            range(4),
            2,
            id="quota above the cores",
        ),
    ],
)
def test_threads_are_the_cores_that_this_process_gets_and_that_make_it_faster(
    files: dict[str, str],
    allowed: range | set[int],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(files, tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(allowed))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert compute_threads(root=tmp_path) == expected


def test_this_machine_has_cores_to_compute_with() -> None:
    assert 1 <= computing_cores() <= usable_cpus()


def test_a_quota_of_less_than_a_core_is_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_quota(Path("nowhere")) == math.inf
    for quota, expected in ((0.5, 1), (1.9, 1), (math.inf, usable_cpus())):
        monkeypatch.setattr(cores, "cpu_quota", lambda _root, quota=quota: quota)
        assert usable_cores() == min(expected, usable_cpus())


def threads() -> set[str]:
    """The numbers of this process' threads, with those of other tests that are about to end."""
    return {task.name for task in Path("/proc/self/task").iterdir()}


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@linux
@pytest.mark.usefixtures("two_threads")
def test_a_sleeping_team_is_kept_while_others_need_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    expected = values @ values
    library = cores._libgomp()
    assert library is not None
    share, waited = threading.Event(), [0.0]

    def count() -> float:
        waited[0] += 0.01 if share.is_set() else 0.0
        return waited[0]

    monkeypatch.setattr(cores, "CHECK_EVERY_S", 0.01)
    monkeypatch.setattr(cores, "_waited", count)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    before, team = threads(), library.omp_get_num_procs() + 1
    with sharing_cores():
        for _ in range(3):
            until(lambda: len(threads() - before) == 1)  # the one that watches
            share.set()
            until(lambda: len(threads() - before) == 1 + team)
            assert torch.equal(values @ values, expected)
            share.clear()
        share.set()
        until(lambda: len(threads() - before) == 1 + team)
    until(lambda: not threads() - before)


@linux
def test_how_long_threads_wait_for_cores_is_counted() -> None:
    """Two threads on one core: each waits about as long as the other works."""

    def work() -> None:
        ended = time.monotonic() + 0.2
        while time.monotonic() < ended:
            hashlib.sha256(bytes(1 << 20))  # without the interpreter's lock

    allowed, before = os.sched_getaffinity(0), cores._waited()
    os.sched_setaffinity(0, {min(allowed)})
    try:
        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(0.15)
        assert cores._waited() - before > 0.02
    finally:
        os.sched_setaffinity(0, allowed)
    for worker in workers:
        worker.join()


@linux
@pytest.mark.parametrize("name", sorted(cores.CHOSEN))
def test_a_user_who_has_chosen_how_threads_wait_is_left_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    before = threads()
    with sharing_cores():
        assert not threads() - before
