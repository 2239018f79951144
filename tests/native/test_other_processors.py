"""Builds for other machines than this one: which of them a processor gets, and what is linked for a Mac."""

from __future__ import annotations

import inspect
import platform
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolctl.generation import native_engine
from smolctl.native import build, library
from tests.support.emulated import emulated

# What Python calls, as a Mac's linker names it.
FUNCTIONS = {
    f"_{name}"
    for module in (library, native_engine)
    for name in re.findall(r"smolctl_\w+", inspect.getsource(module))
}
PROCESSORS = {"arm64": 0x0100000C, "x86_64": 0x01000007}  # CPU_TYPE_* of mach/machine.h
MACS = [
    (machine, level)
    for (system, machine), levels in build.LEVELS.items()
    if system == "Darwin"
    for level in levels
]


@pytest.mark.proof
@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("cortex-a53", "baseline"),
        ("cortex-a57", "baseline"),
        ("cortex-a76", "dotprod"),
        ("neoverse-n1", "dotprod"),
        ("max", "bf16"),
        ("max,midr=0x61000000", "dotprod"),  # Apple's: slower in bfloat16
    ],
)
def test_an_arm_processor_gets_the_best_build_that_it_runs(processor: str, expected: str) -> None:
    levels = list(build.LEVELS["Linux", "aarch64"])
    assert levels[emulated("baseline", processor).smolctl_level()] == expected


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("Linux", "x86_64", ["baseline", "avx2", "avx512", "avx512bf16"]),
        ("Darwin", "x86_64", ["baseline", "avx2", "avx512", "avx512bf16"]),
        ("Linux", "aarch64", ["baseline", "dotprod", "bf16"]),
        ("Darwin", "arm64", ["baseline"]),
        ("Linux", "riscv64", ["baseline"]),
    ],
)
def test_every_machine_has_a_baseline_and_what_its_processors_add(
    system: str, machine: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert list(build.levels()) == expected
    assert library.BUILDS[0] == "baseline"


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("x86_64", ["-march=x86-64"]),
        ("x86_64_v4+avx512vnni+avx512bf16", ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"]),
        ("generic", []),
        ("generic+dotprod", ["-march=armv8.2-a+dotprod"]),
        ("generic+dotprod+i8mm+bf16", ["-march=armv8.2-a+dotprod+i8mm+bf16"]),
        ("", []),
    ],
)
def test_compilers_of_the_system_are_told_a_level_in_their_own_words(level: str, expected: list[str]) -> None:
    assert build.system_options(level) == expected


def commands_of(image: bytes) -> Iterator[tuple[int, bytes]]:
    """The load commands of a 64-bit Mach-O file: their kinds and contents."""
    at = 32
    for _ in range(struct.unpack_from("<I", image, 16)[0]):
        kind, size = struct.unpack_from("<2I", image, at)
        yield kind, image[at : at + size]
        at += size


def exported_names(image: bytes, symbol_table: bytes) -> set[str]:
    """Names that a Mach-O file defines for others: LC_SYMTAB and `nlist_64`."""
    entries, count, names, _ = struct.unpack_from("<4I", symbol_table, 8)
    found = set()
    for at in range(entries, entries + 16 * count, 16):
        name, kind = struct.unpack_from("<IB", image, at)
        if kind & 0x01 and kind & 0x0E:  # external, and not undefined
            found.add(image[names + name :].partition(b"\0")[0].decode())
    return found


@pytest.mark.proof
@pytest.mark.parametrize(("machine", "level"), MACS)
def test_a_library_for_a_mac_is_linked_with_all_functions(machine: str, level: str, tmp_path: Path) -> None:
    """It is not run: that takes a Mac."""
    if not build.zig():
        pytest.skip("ziglang is not installed: it links for other systems")
    options = build.zig_options(build.LEVELS["Darwin", machine][level], build.SYSTEMS["Darwin", machine][0])
    made = tmp_path / "forward.so"
    command = [*build.zig()[0], *build.FLAGS, str(build.HERE / "forward.c"), *options, *build.NATIVE_FLAGS]
    done = subprocess.run([*command, "-o", made], check=True, capture_output=True, text=True)
    assert not done.stderr  # such as warnings of functions that the oldest system lacks
    image = made.read_bytes()
    magic, processor, _, kind = struct.unpack_from("<4I", image)
    assert (magic, processor, kind) == (0xFEEDFACF, PROCESSORS[machine], 6)  # MH_MAGIC_64, …, MH_DYLIB
    commands = dict(commands_of(image))
    exported = exported_names(image, commands[0x2])  # LC_SYMTAB
    assert {name for name in exported if name.startswith("_smolctl")} == FUNCTIONS
    # The only library that it needs is the system's, and ARM Macs run no code without a signature.
    needed = [
        content[24:].rstrip(b"\0") for kind, content in commands_of(image) if kind == 0xC
    ]  # LC_LOAD_DYLIB
    assert needed == [b"/usr/lib/libSystem.B.dylib"]
    assert machine == "x86_64" or 0x1D in commands  # LC_CODE_SIGNATURE
