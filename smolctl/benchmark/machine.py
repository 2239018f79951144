"""The machine that runs the bench, and how busy it is with other work."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from smolctl import __version__
from smolctl.cores import machine_memory, usable_cpus
from smolctl.extras import installed_version

PACKAGES = ("torch", "transformers", "tokenizers", "llama-cpp-python", "litgpt", "numpy", "lightning")
# Above these shares results are called disturbed: 5 % of the machine's time is as large as a difference in
# speed that people would report.
OTHERS_SHARE = 0.05
STEAL_SHARE = 0.02
# Generations of AMD's Zen, by CPU family and the first of the model's two hexadecimal digits, as in Linux's
# arch/x86/kernel/cpu/amd.c.
ZEN = {
    0x17: {1: "0125", 2: "34679a"},
    0x19: {3: "02345", 4: "16789a"},
    0x1A: {5: "012467", 6: "589acde"},
}


@dataclass(frozen=True)
class Machine:
    """The properties that speed depends on."""

    cpu: str  # name, and generation where it is known
    gpu: str | None  # present, but not used
    logical_cpus: int  # that this process may use
    threads: int  # per engine
    memory_bytes: int | None
    instructions: str  # the set that PyTorch uses: AVX2, AVX512
    os: str
    versions: dict[str, str]  # of Python and of the packages that are installed

    @property
    def identity(self) -> tuple[str, int, int]:
        """Times are comparable between machines with equal identity."""
        return self.cpu, self.logical_cpus, self.threads


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of CPU time since some moment."""

    total: float  # all processors, including idle time
    idle: float
    steal: float  # taken by the host of a virtual machine
    own: float  # of this process and its child processes


@dataclass(frozen=True)
class SystemLoad:
    """How busy the machine was with other work."""

    load_average: float | None  # in the minute before the start
    others: float | None  # share of all processors' time that other processes used in between
    steal: float | None


def describe_machine(threads: int) -> Machine:
    """What the operating system reports about the machine."""
    packages = {package: found for package in PACKAGES if (found := installed_version(package))}
    return Machine(
        cpu=_cpu_name(),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        logical_cpus=usable_cpus(),
        threads=threads,
        memory_bytes=machine_memory(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        os=f"{platform.system()} {platform.release()}",
        versions={"python": platform.python_version(), "smolctl": __version__, **packages},
    )


def load_average() -> float | None:
    """Runnable processes in the last minute; None where the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu_times(children: Iterable[int] = ()) -> CpuTimes | None:
    """CPU time so far; None where there is no /proc/stat.

    Args:
        children: ids of child processes that are still running.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    # user nice system idle iowait irq softirq steal; guest time is in user already
    values = [int(value) / ticks for value in stat.read_text().splitlines()[0].split()[1:9]]
    here = os.times()
    own = here.user + here.system + here.children_user + here.children_system
    own += sum(_process_seconds(child, ticks) for child in children)
    return CpuTimes(sum(values), values[3] + values[4], values[7], own)


def load_between(before: CpuTimes | None, after: CpuTimes | None, average: float | None) -> SystemLoad:
    """The machine's other work between two measurements of CPU time."""
    if before is None or after is None or after.total <= before.total:
        return SystemLoad(average, None, None)
    total = after.total - before.total
    steal = (after.steal - before.steal) / total
    busy = total - (after.idle - before.idle)
    others = (busy - (after.own - before.own)) / total - steal
    return SystemLoad(average, max(0.0, others), steal)


def disturbance(load: SystemLoad, cpus: int) -> str:
    """Why numbers measured in this time are doubtful; "" if they are not.

    The load average before the start counts only if nothing better is known, because it still includes
    processes that ended half a minute ago.
    """
    found = []
    if load.others is not None and load.others > OTHERS_SHARE:
        found.append(f"other processes took {load.others:.0%} of the processors' time")
    if load.steal is not None and load.steal > STEAL_SHARE:
        found.append(f"the host took {load.steal:.0%} of the processors' time away")
    if load.others is None and load.load_average is not None and load.load_average > 0.5 * cpus:
        found.append(f"the load average was {load.load_average:.1f} on {cpus} processors before the start")
    return " and ".join(found)


def named_cpu(cpuinfo: str) -> str:
    """The name of the first processor in the text of /proc/cpuinfo; "" if it has none.

    The generation of an AMD processor is added, because a virtual machine may call any of them "AMD EPYC".
    """
    pairs = (line.partition(":") for line in cpuinfo.partition("\n\n")[0].splitlines())
    found = {key.strip(): value.strip() for key, _, value in pairs}
    name = found.get("model name", "")
    if found.get("vendor_id") == "AuthenticAMD":
        digit = f"{int(found['model']):02x}"[0]
        for generation, digits in ZEN.get(int(found["cpu family"]), {}).items():
            if digit in digits:
                return f"{name} (Zen {generation})"
    return name


def _process_seconds(process: int, ticks: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / ticks  # utime, stime


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    named = named_cpu(info.read_text()) if info.exists() else ""
    return named or platform.processor() or platform.machine()
