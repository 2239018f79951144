"""Runs inputs in forked children with limits, so that a hang, a bomb or a crash is counted and named.

A child is told what it may do by limits of the operating system and by Python's audit events: it may not hold
more than 2 GB, compute for more than 10 seconds, write outside of its own folder, or start or reach anything.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolctl.errors import ExitCode, SmolError

SECONDS, BYTES = 10, 2_000_000_000  # of the processor, of memory
WAIT = 60  # seconds that an input may take in all, on a machine that others use too
BATCH = 500  # inputs that one child runs
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "ctypes.dlopen")
CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
)
# A case writes an input into a folder and gives back what a command does with it.
Case = Callable[[random.Random, Path], Iterable[Callable[[], object]]]


@dataclass(frozen=True)
class Finding:
    """An input that did not end as it should."""

    name: str  # kind:number
    what: str  # "hang", "killed by 11", "KeyError at smolctl/x.py:12 in f"


@dataclass(frozen=True)
class Outcome:
    """What many inputs have led to."""

    counts: Counter[str]  # by "kind fine", "kind refused", "kind WRONG"
    findings: tuple[Finding, ...]


def run_cases(
    cases: Sequence[tuple[str, Case]], numbers: Sequence[int], note: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Every case with every number, in children of this process.

    Args:
        cases: by kind.
        numbers: of the inputs.
        note: hears each finding.
    """
    work = [(f"{kind}:{number}", case) for kind, case in cases for number in numbers]
    counts: Counter[str] = Counter()
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="smolctl-fuzz-") as box:
        while work:
            done, results = 0, _in_child(work[:BATCH], Path(box))
            for name, what in results:
                done += 1
                kind = name.partition(":")[0]
                counts[f"{kind} {what if what in ('fine', 'refused') else 'WRONG'}"] += 1
                if what not in ("fine", "refused"):
                    findings.append(Finding(name, what))
                    note(f"{name}  {what}")
            work = work[done:]
    return Outcome(counts, tuple(findings))


def _in_child(work: Sequence[tuple[str, Case]], box: Path) -> Iterator[tuple[str, str]]:
    """The names of inputs and what each led to. The child ends early at what only its death can end."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        try:
            _child(work, box, writing)
        finally:
            os._exit(1)
    os.close(writing)
    begun, said = "", b""
    while select.select([reading], [], [], WAIT)[0] and (chunk := os.read(reading, 1 << 16)):
        *lines, said = (said + chunk).split(b"\n")
        for line in lines:
            word, _, rest = line.decode("utf-8", "replace").partition("\t")
            if word == "end":
                yield begun, rest
            begun = rest if word == "begin" else ""
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if begun:
        number = os.WTERMSIG(status)
        yield begun, "hang" if number in (signal.SIGPROF, signal.SIGKILL) else f"killed by signal {number}"


def _child(work: Sequence[tuple[str, Case]], box: Path, writing: int) -> None:
    results = os.fdopen(writing, "w", buffering=1, encoding="utf-8")
    quiet = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(quiet, standard)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, held + BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    faulthandler.disable()  # pytest's, which would tell of every crash
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{box}/torch", "MPLCONFIGDIR": f"{box}/matplotlib"}
    os.environ |= {"SMOLCTL_CACHE": f"{box}/cache"}
    tempfile.tempdir = str(box)
    crossed = _watched(box)
    for name, case in work:
        folder = box / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.chdir(folder)
        crossed.clear()
        results.write(f"begin\t{name}\n")
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        what = judged(name, case, folder)
        signal.setitimer(signal.ITIMER_PROF, 0)
        results.write(f"end\t{crossed.pop() if crossed else what}\n")
    results.flush()


def _watched(box: Path) -> list[str]:
    """What is done outside of a folder from now on."""
    crossed: list[str] = []
    inside = (str(box), "/dev/null", "/proc/self")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            # A stand-in for the Hub, a process of ours, and one that matplotlib asks for fonts.
            own = any(name in str(arguments) for name in ("127.0.0.1", "smolctl.worker", "fc-list"))
            if own or event == "ctypes.dlopen":
                return
            crossed.append(f"{event} {str(arguments)[:80]}")
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        in_folder = len(arguments) > 1 and isinstance(arguments[-1], int) and arguments[-1] >= 0
        if is_write or (event in CHANGES and not in_folder):
            path = os.fspath(arguments[0]) if not isinstance(arguments[0], int) else ""
            place = os.path.realpath(os.fsdecode(path)) if path else inside[0]
            if not place.startswith(inside):
                crossed.append(f"{event} outside: {place[:80]}")

    sys.addaudithook(watch)
    return crossed


def judged(name: str, case: Case, folder: Path) -> str:
    """What an input leads to: "fine", "refused" with a cause and a remedy, or what went wrong."""
    try:
        act = chosen(name, case, folder)
    except Exception as error:
        return f"the input cannot be made: {_place(error)}"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            act()
    except SmolError as error:
        lines = error.message.splitlines()
        if error.exit_code is ExitCode.FAILED or len(lines) != 1 or not error.hint:
            return f"{type(error).__name__} of {len(lines)} lines, code {int(error.exit_code)}: {lines[:1]}"[
                :200
            ]
        return "refused"
    except BaseException as error:
        return _place(error)
    return "fine"


def chosen(name: str, case: Case, folder: Path) -> Callable[[], object]:
    """Write an input and choose one of the commands that read it."""
    chance = random.Random(name)
    return chance.choice(list(case(chance, folder)))


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/smolctl/" in frame.filename] or frames[-1:]
    where = ours[-1].filename.partition("/smolctl/")[2] or ours[-1].filename
    said = " ".join(str(error).split())[:100]
    return f"{type(error).__name__} at {where}:{ours[-1].lineno} in {ours[-1].name}: {said}"


def show(name: str, case: Case) -> None:
    """Run one input in this process, with everything it prints and its traceback; its folder stays."""
    folder = Path(tempfile.mkdtemp(prefix="smolctl-fuzz-"))
    os.chdir(folder)
    print(folder)
    try:
        chosen(name, case, folder)()
    except SmolError as error:
        print(f"{type(error).__name__}: {error.message}\n  {error.hint}")
    except BaseException:
        traceback.print_exc()
