"""Compiles the forward pass when the package is built, and for a checkout: python -m smolctl.native.build

The compiler is clang from the `ziglang` package, so that nothing has to be installed by hand; without that
package, a compiler of the system is used. If neither works, the package is built without the compiled engine,
and PyTorch is used instead.

The same source is compiled to WebAssembly for the page that runs a model in a browser. This works on every
machine, but only with `ziglang`; without it, there is no such page.
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
    # Sums may use fused multiply-adds, and no code checks the error codes of mathematical functions.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
NATIVE_FLAGS = ("-fPIC", "-shared", "-pthread", "-lm")
# The CPU features of each build, in zig's notation, from the least demanding: `smolctl_level` of forward.c
# returns an index into this order. Every ARM Mac has 8-bit dot products, which its baseline uses.
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

# The oldest systems that builds with `ziglang` support, in its notation and in that of wheels: glibc 2.17
# (2012), the first macOS with `aligned_alloc`, and the first macOS for ARM.
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
# Shared memory is declared with its maximum size, which browsers require to be below 4 GiB.
WASM_BUILDS = {
    "engine.wasm": (WASM_CPU,),
    "engine-threads.wasm": (f"{WASM_CPU}+atomics", "-Wl,--shared-memory", "-Wl,--max-memory=4294901760"),
}


def compilers() -> list[list[str]]:
    """Commands that compile C, in order of preference."""
    return zig() + [[path] for name in ("clang", "gcc", "cc") if (path := shutil.which(name))]


def zig() -> list[list[str]]:
    """The command of the `ziglang` package, if it is installed."""
    return [[sys.executable, "-m", "ziglang", "cc"]] if importlib.util.find_spec("ziglang") else []


def build() -> list[Path]:
    """Compile every level that the compiler supports, in this file's folder, and the engines for browsers.

    Returns:
        The files made; empty without a working compiler.
    """
    return build_native() + build_wasm()


def this_machine() -> tuple[str, str]:
    """The operating system and the processor, in the notation of `LEVELS` and `SYSTEMS`."""
    return platform.system(), platform.machine()


def levels() -> dict[str, str]:
    """The entry of `LEVELS` for this machine; on other machines one build for the compiler's default
    target.
    """
    return LEVELS.get(this_machine(), {"baseline": ""})


def oldest_system() -> tuple[str, str] | None:
    """The entry of `SYSTEMS` for this machine; None if a build is only for this machine."""
    has_glibc = platform.system() != "Linux" or platform.libc_ver()[0] == "glibc"
    return SYSTEMS.get(this_machine()) if has_glibc else None


def build_native(commands: Sequence[list[str]] | None = None) -> list[Path]:
    """Compile every level that the first working compiler supports.

    Args:
        commands: of compilers; None: all installed ones.
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
    """zig's options for a level of `LEVELS` and a system of `SYSTEMS`."""
    return [*(["-target", target] if target else []), *([f"-mcpu={level}"] if level else [])]


def system_options(level: str) -> list[str]:
    """Options of clang and gcc, which use other names, for a level of `LEVELS` on this machine."""
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
