"""A process that answers with the compiled engine imports nothing that only other commands need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from smolctl.quantization.quantize import QuantizeOptions, quantize
from tests.support.tiny_models import write_folder

ANSWER = """
import sys
from smolctl.cli.main import application
from smolctl.generation.load import load_model
from smolctl.publish.space_endpoints import SpaceEndpoints
for model in sys.argv[1:]:
    for options in (["--prompt", "the"], ["--prompt", "the", "--chat"], ["--jsonl", "prompts.jsonl"]):
        application()(["sample", model, *options, "--max-tokens", "4", "--json"], standalone_mode=False)
    assert SpaceEndpoints(load_model(model)).engine().startswith("native"), model
heavy = {"torch", "transformers", "datasets", "lightning", "gradio", "gguf", "matplotlib"}
print(sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.cold
def test_an_answer_of_the_compiled_engine_imports_no_pytorch(here: Path) -> None:
    model = write_folder(Path("model"), intermediate_size=64)
    quantize(
        str(model), QuantizeOptions(("bf16", "int8", "int4", "gguf-q4_1"), out=Path("out"), measure=False)
    )
    Path("prompts.jsonl").write_text('"the cat"\n')
    models = [model, *Path("out").iterdir()]
    assert len(models) == 5
    done = subprocess.run([sys.executable, "-c", ANSWER, *models], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
