"""Compiles the forward pass when the package is built, and for a checkout: python -m smolctl.native.build

The compiler is clang as the `ziglang` package brings it, so that nothing has to be installed by hand; a
compiler of the system's stands in where that package is missing. Where neither works, the package is built
without the compiled engine, and PyTorch does its work.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-s"),
    # Sums may use fused multiply-adds, and no code asks for the errors of mathematical functions.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
# Microarchitecture levels by the names in library.py; "" is what the compiler takes for the family.
X86_LEVELS = {
    "baseline": "x86_64",
    "avx2": "x86_64_v3",
    "avx512": "x86_64_v4",
    "avx512bf16": "x86_64_v4+avx512bf16",
}


def compilers() -> list[list[str]]:
    """Commands that compile C, the preferred first."""
    found = [[sys.executable, "-m", "ziglang", "cc"]] if importlib.util.find_spec("ziglang") else []
    return found + [[path] for name in ("clang", "gcc", "cc") if (path := shutil.which(name))]


def build() -> list[Path]:
    """Compile every level that the compiler knows, beside this file.

    Returns:
        The files made; empty when there is no working compiler.
    """
    levels = X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": ""}
    for compiler in compilers() if os.name == "posix" else ():
        made = [path for name, level in levels.items() if (path := _compile(compiler, name, level))]
        if made:
            return made
    return []


def _compile(compiler: list[str], name: str, level: str) -> Path | None:
    target = HERE / f"forward_{name}.so"
    partial = target.with_suffix(f".{os.getpid()}.partial")
    zig = "ziglang" in compiler
    march = level.replace("_v", "-v").replace("x86_64", "x86-64").replace("+", " -m")
    options = [f"-mcpu={level}"] if zig else f"-march={march}".split()
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, *FLAGS, *(options if level else []), str(HERE / "forward.c")]
        caches = {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}
        done = subprocess.run(
            [*command, "-o", str(partial), "-lm"],
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
