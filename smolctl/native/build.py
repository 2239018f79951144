"""Compiles the forward pass when the package is built, and for a checkout: python -m smolctl.native.build

The compiler is clang as the `ziglang` package brings it, so that nothing has to be installed by hand; a
compiler of the system's stands in where that package is missing. Where neither works, the package is built
without the compiled engine, and PyTorch does its work.

The same source becomes WebAssembly for the page that runs a model in a browser. Only `ziglang` compiles that
on every machine: without it, there is no such page.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = (
    *("-O3", "-std=gnu11", "-fvisibility=hidden", "-s"),
    # Sums may use fused multiply-adds, and no code asks for the errors of mathematical functions.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
NATIVE_FLAGS = ("-fPIC", "-shared", "-pthread", "-lm")
# What each build needs of the processor, in zig's words, the least first: `smolctl_level` of forward.c gives
# a place in this order. Every Mac with an ARM processor has dot products of bytes: its baseline uses them.
LEVELS = {
    ("Linux", "x86_64"): {
        "baseline": "x86_64",
        "avx2": "x86_64_v3",
        "avx512": "x86_64_v4",
        "avx512bf16": "x86_64_v4+avx512vnni+avx512bf16",
    },
    ("Linux", "aarch64"): {
        "baseline": "generic",
        "dotprod": "generic+dotprod",
        "bf16": "generic+dotprod+i8mm+bf16",
    },
    ("Darwin", "arm64"): {"baseline": "apple_m1"},
}
LEVELS["Darwin", "x86_64"] = LEVELS["Linux", "x86_64"]

# The oldest systems that builds of `ziglang` run on, in its words and in those of a wheel: glibc 2.17 (2012),
# the first macOS that has `aligned_alloc`, and the first one for ARM.
SYSTEMS = {
    ("Linux", "x86_64"): ("x86_64-linux-gnu.2.17", "manylinux2014_x86_64.manylinux_2_17_x86_64"),
    ("Linux", "aarch64"): ("aarch64-linux-gnu.2.17", "manylinux2014_aarch64.manylinux_2_17_aarch64"),
    ("Darwin", "x86_64"): ("x86_64-macos.10.15", "macosx_10_15_x86_64"),
    ("Darwin", "arm64"): ("aarch64-macos.11.0", "macosx_11_0_arm64"),
}

# WebAssembly without a C library: the memory is its only import. 64 KiB of stack: STACK_BYTES of threads.h.
WASM_FLAGS = (
    *("-target", "wasm32-freestanding", "-nostdlib", "-Wl,--no-entry", "-Wl,-z,stack-size=65536"),
    *("-Wl,--import-memory", "-Wl,--export-dynamic"),
    *("-Wl,--export=__heap_base", "-Wl,--export=__stack_pointer"),
)
WASM_CPU = "-mcpu=generic+simd128+bulk_memory+mutable_globals"
# The memory of threads is declared with its limit, which browsers want below 4 GiB.
WASM_BUILDS = {
    "engine.wasm": (WASM_CPU,),
    "engine-threads.wasm": (f"{WASM_CPU}+atomics", "-Wl,--shared-memory", "-Wl,--max-memory=4294901760"),
}


def compilers() -> list[list[str]]:
    """Commands that compile C, the preferred first."""
    return zig() + [[path] for name in ("clang", "gcc", "cc") if (path := shutil.which(name))]


def zig() -> list[list[str]]:
    """The command of the `ziglang` package, where that is installed."""
    return [[sys.executable, "-m", "ziglang", "cc"]] if importlib.util.find_spec("ziglang") else []


def build() -> list[Path]:
    """Compile every level that the compiler knows, beside this file, and the engines for browsers.

    Returns:
        The files made; empty when there is no working compiler.
    """
    return build_native() + build_wasm()


def this_machine() -> tuple[str, str]:
    """The operating system and the processor, as `LEVELS` and `SYSTEMS` name them."""
    return platform.system(), platform.machine()


def levels() -> dict[str, str]:
    """The entry of `LEVELS` for this machine; elsewhere one build of what the compiler takes for it."""
    return LEVELS.get(this_machine(), {"baseline": ""})


def oldest_system() -> tuple[str, str] | None:
    """The entry of `SYSTEMS` for this machine; None where a build is for this machine alone."""
    has_glibc = platform.system() != "Linux" or platform.libc_ver()[0] == "glibc"
    return SYSTEMS.get(this_machine()) if has_glibc else None


def build_native(commands: Sequence[list[str]] | None = None) -> list[Path]:
    """Compile every level that the first working compiler knows.

    Args:
        commands: of compilers; None: all that are installed.
    """
    for compiler in (compilers() if commands is None else commands) if os.name == "posix" else ():
        made = [path for name, level in levels().items() if (path := _compile_level(compiler, name, level))]
        if made:
            return made
    return []


def build_wasm() -> list[Path]:
    """Compile the engines for browsers: both, or none."""
    made = [
        path
        for compiler in zig()
        for name, options in WASM_BUILDS.items()
        if (path := _compile(compiler, name, (*WASM_FLAGS, *options)))
    ]
    return made if len(made) == len(WASM_BUILDS) else []


def _compile_level(compiler: list[str], name: str, level: str) -> Path | None:
    if "ziglang" in compiler:
        system = oldest_system()
        options = zig_options(level, system and system[0])
    else:
        options = system_options(level)
    return _compile(compiler, f"forward_{name}.so", (*options, *NATIVE_FLAGS))


def zig_options(level: str, target: str | None) -> list[str]:
    """How zig compiles for a level of `LEVELS` and a system of `SYSTEMS`."""
    return [*(["-target", target] if target else []), *([f"-mcpu={level}"] if level else [])]


def system_options(level: str) -> list[str]:
    """How clang and gcc, which know other names, compile for a level of `LEVELS` on this machine."""
    base, *features = level.split("+")
    if base.startswith("x86_64"):
        return [f"-march={base.replace('_', '-')}", *(f"-m{name}" for name in features)]
    return ["-march=" + "+".join(["armv8.2-a", *features])] if features else []


def _compile(compiler: list[str], name: str, options: Sequence[str]) -> Path | None:
    target = HERE / name
    partial = target.with_suffix(f".{os.getpid()}.partial")
    with tempfile.TemporaryDirectory() as folder:
        caches = {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}
        done = subprocess.run(
            [*compiler, *FLAGS, str(HERE / "forward.c"), *options, "-o", str(partial)],
            env=os.environ | caches,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        partial.unlink(missing_ok=True)
        print(f"{name}: not compiled\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    partial.replace(target)
    return target


if __name__ == "__main__":
    files = build()
    print("\n".join(str(file) for file in files) or "nothing was compiled")
    sys.exit(0 if files else 1)
