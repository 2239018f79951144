"""A file that is shortened while it is mapped: an error, where the system would end the process silently."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import Smolctl

# Opens a model, empties its file, and reads the weights.
READ = """
import os, sys
import numpy as np
from smolctl.sources import open_source

from smolctl.mapped import exit_if_shortened
from smolctl.views.output import Output

if "library" not in sys.argv:
    exit_if_shortened(Output("--json" in sys.argv).error)
tensors = list(open_source(sys.argv[1]).require_weights().stored())
os.truncate(sys.argv[2], 0)
print(sum(float(np.asarray(values, np.float32).sum()) for _, values in tensors))
"""


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors", "gguf"])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_mapped_file_that_shrinks_is_named(
    here: Path, smolctl: Smolctl, kind: str, options: tuple[str, ...]
) -> None:
    model = file = here / "runs" / "llama" / "checkpoints" / "final.ckpt"
    if kind == "safetensors":
        assert smolctl("push", "runs/llama", "--local-dir", "model").code == 0
        model, file = here / "model", here / "model" / "model.safetensors"
    if kind == "gguf":
        assert smolctl("quantize", "runs/llama", "--to", "gguf-f16", "--no-measure", "--out", "out").code == 0
        (file,) = (here / "out").glob("*.gguf")
        model = file
    command = [sys.executable, "-c", READ, str(model), str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done
    assert done.stdout == ""
    if options:
        error = json.loads(done.stderr)["error"]
        assert error["code"] == 3
        assert f"{file}: was shortened" in error["message"]
    else:
        cause, remedy = done.stderr.splitlines()
        assert cause.startswith(f"error: {file}: was shortened while it was in use")
        assert remedy.startswith(" hint: ")


def test_a_library_leaves_the_signal_alone(here: Path) -> None:
    file = here / "runs" / "llama" / "checkpoints" / "final.ckpt"
    command = [sys.executable, "-c", READ, str(file), str(file), "library"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGBUS
