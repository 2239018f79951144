"""Hatchling's hook: compiles before a wheel is packed, and packs a pure one if that fails."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PURE = "SMOLCTL_PURE_WHEEL"  # set to build the wheel for systems without a wheel of their own


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs build.py, loaded by path, because the package itself cannot be imported yet."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        if sys.platform == "win32":
            raise RuntimeError("smolctl runs on Linux and macOS, not on Windows. Install it in WSL 2.")
        path = Path(self.root) / "smolctl" / "native" / "build.py"
        spec = importlib.util.spec_from_file_location("smolctl_native_build", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        native: list[Path] = []
        if os.environ.get(PURE):
            for file in path.parent.glob("*.so"):  # of an earlier build
                file.unlink()
        elif native := module.build_native(module.zig()):
            system = (module.oldest_system() or (None, system))[1]
        else:
            native = module.build_native()
        wasm = module.build_wasm()
        build_data["artifacts"] += [str(file.relative_to(self.root)) for file in (*native, *wasm)]
        if not wasm:
            self.app.display_warning("ziglang did not work: smolctl cannot make pages that run a model")
        if not native and not os.environ.get(PURE):
            self.app.display_warning("no C compiler worked: smolctl will run on PyTorch alone, slower")
        if native:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{system}"
