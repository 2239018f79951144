"""The machine's cores: how many this process may use, and how its threads wait while other processes need
them.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

ROOT = Path("/")
# Relative speeds of cores, from Linux's cpu_capacity. Without it, Intel's efficiency cores are assumed to be
# half as fast as the others, which was not measured.
FULL_SPEED, SLOW_CORE = 1024, 512
CHECK_EVERY_S = 1.0
# Time that this process's threads together wait for a core, as a share of one core's time: above the first
# value the process shares the machine, below the second it does not. Measured, see docs/benchmarks.md.
SHARED, ALONE = 0.2, 0.05
CHOSEN = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}  # variables with which a user decides how threads wait


def usable_cpus() -> int:
    """Logical processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores(root: Path = ROOT) -> int:
    """Processors' worth of time for this process, including its container's quota; at least 1."""
    return max(1, math.floor(min(usable_cpus(), cpu_quota(root))))


def computing_cores(root: Path = ROOT) -> int:
    """The number of usable cores with which equal shares of work finish first.

    A core counts once, however many logical processors it has. If some cores are slower, the others wait for
    them: n cores do n times the work of the slowest of them.

    Args:
        root: of the file system.
    """
    if sys.platform == "darwin":
        return _mac_fast_cores() or usable_cpus()
    if not hasattr(os, "sched_getaffinity"):
        return usable_cpus()
    slow = _listed(root / "sys/devices/cpu_atom/cpus")
    speeds = {}
    for cpu in os.sched_getaffinity(0):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}"
        speed = _text(folder / "cpu_capacity")  # ARM, and Intel with newer kernels: 1024 is the fastest core
        default = SLOW_CORE if cpu in slow else FULL_SPEED
        speeds[_text(folder / "topology/thread_siblings_list") or str(cpu)] = (
            int(speed) if speed.isdecimal() else default
        )
    fastest_first = sorted(speeds.values(), reverse=True)
    return max(range(1, len(speeds) + 1), key=lambda count: count * fastest_first[count - 1])


def _text(path: Path) -> str:
    """The text of a kernel file; empty if there is none."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _listed(path: Path) -> set[int]:
    """The processors of a list such as "16-23,30"."""
    ends = [part.split("-") for part in _text(path).split(",") if part]
    return {cpu for part in ends for cpu in range(int(part[0]), int(part[-1]) + 1)}


def _mac_fast_cores() -> int:
    """Performance cores of an ARM Mac, which PyTorch uses too; 0 if the system does not report them."""
    count = ctypes.c_int32()
    size = ctypes.c_size_t(ctypes.sizeof(count))
    ask = ctypes.CDLL(None).sysctlbyname
    failed = ask(
        b"hw.perflevel0.physicalcpu", ctypes.byref(count), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return 0 if failed else count.value


def compute_threads(asked: int | None = None, root: Path = ROOT) -> int:
    """The number of threads to compute with, at most one per logical processor: more of them wait for each
    other, and very many crash.

    Args:
        asked: by the user; None: OMP_NUM_THREADS, which PyTorch reads too, or else one for each core that
            this process gets and that makes it faster.
        root: of the file system.
    """
    if asked is None:
        chosen = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # the first of nested levels
        wanted = int(chosen) if chosen.isdecimal() else 0
        asked = wanted or min(computing_cores(root), usable_cores(root))
    return min(asked, usable_cpus())


def cpu_quota(root: Path = ROOT) -> float:
    """Processors' worth of time that Linux's control groups allow; `inf` if there is no limit.

    Groups of version 1 and 2 are read, with their parents; the smallest limit counts. In a container, the
    path in /proc/self/cgroup may be the host's; then the container's own group is at the top.

    Args:
        root: of the file system.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for line in lines:
        _, controllers, name = line.split(":", 2)
        places = [PurePosixPath(name), *PurePosixPath(name).parents]
        for mount in (".", "cpu", "cpu,cpuacct") if "cpu" in controllers.split(",") else (".", "unified"):
            quotas += [_quota_of(root / "sys/fs/cgroup" / mount / f"./{place}") for place in places]
    return min(quotas)


def _quota_of(group: Path) -> float:
    """The quota of one control group: microseconds in a period of microseconds."""
    try:
        if (group / "cpu.max").is_file():  # version 2: "max 100000" or "200000 100000"
            most, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            most, period = (
                (group / f"cpu.cfs_{part}_us").read_text(encoding="ascii") for part in ("quota", "period")
            )
        return int(most) / int(period) if int(most) > 0 else math.inf  # -1: no limit
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


@contextmanager
def sharing_cores() -> Iterator[None]:
    """Let OpenMP's threads yield their cores at every barrier while other processes need them.

    A thread of libgomp spins for milliseconds at a barrier before it sleeps. On an otherwise idle machine
    this is fastest; but if another process occupies the core of the thread that all wait for, the spinning is
    lost time. The spinning time is fixed when the process starts, but as long as libgomp counts more threads
    than processors, it hardly spins at all. So, while this process has to wait for cores, a second team of
    threads that only sleep is kept. The number of computing threads does not change, and neither do the
    results.

    Does nothing without libgomp (macOS, Windows), or if the system does not report how long threads wait
    (/proc/self/task/*/schedstat).
    """
    end = threading.Event()
    watcher = threading.Thread(target=_watch, args=(end,), daemon=True)
    if not CHOSEN & os.environ.keys():  # otherwise the user has decided how threads wait
        watcher.start()
    try:
        yield
    finally:
        end.set()
        if watcher.is_alive():
            watcher.join()


def _watch(end: threading.Event) -> None:
    """Keep a sleeping team while threads of this process wait for cores, until `end` is set."""
    release: threading.Event | None = None
    before = _waited()
    while not end.wait(CHECK_EVERY_S):
        now = _waited()
        share, before = (now - before) / CHECK_EVERY_S, now
        if release is None and share > SHARED and (library := _libgomp()) is not None:
            release = _sleeping_team(library)
        elif release is not None and share < ALONE:
            release.set()
            release = None
    if release is not None:
        release.set()


def _sleeping_team(library: ctypes.CDLL) -> threading.Event:
    """A team of more threads than there are processors; it sleeps until the event is set."""
    release = threading.Event()

    def hold() -> None:
        # The team belongs to this thread and ends with it. Every member calls free(NULL), which does nothing.
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
        library.GOMP_parallel(nothing, None, library.omp_get_num_procs() + 1, 0)
        release.wait()

    threading.Thread(target=hold, daemon=True).start()
    return release


def _libgomp() -> ctypes.CDLL | None:
    """The OpenMP runtime that PyTorch has loaded; None if it is not libgomp."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "libgomp" in line}
        library = ctypes.CDLL(min(paths, key=lambda path: ("torch" not in path, path)))
    except (OSError, ValueError, IndexError):  # not loaded, or there is no list of libraries
        return None
    return library if hasattr(library, "GOMP_parallel") else None


def _waited() -> float:
    """Seconds that all threads of this process have waited for a core so far; 0 if the system does not
    count them.
    """
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text(encoding="ascii").split()[1])
        except (OSError, ValueError, IndexError):  # a thread that has just ended
            continue
    return total / 1e9


def machine_memory() -> int | None:
    """Bytes of main memory of this machine; None if the operating system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
