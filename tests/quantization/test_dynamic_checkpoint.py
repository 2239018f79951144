"""The checkpoint of `quantize --to int8-dynamic`, which PyTorch's own dynamic quantization would make."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smolctl.errors import InputError
from smolctl.generation.load import load_model
from smolctl.generation.torch_engine import TorchEngine
from smolctl.sources import open_source
from tests.support.processes import Called
from tests.support.quantized_folders import make_quantized


@pytest.mark.parametrize(
    "options", [{}, {"activations": "per-token", "per_row": True, "skip": ("down_proj",)}]
)
def test_dynamic_checkpoint_loads_as_plain_data_and_equals_the_folder(
    here: Path, options: dict[str, Any]
) -> None:
    make_quantized("runs/learned", "int8-dynamic", **options)
    content = torch.load("out/learned_quantized.ckpt", weights_only=True)
    assert {"state_dict", "config", "quantization"} <= content.keys()
    prompt = [[1, 2, 3, 4, 5]]
    logits = []
    for model in ("out", "out/learned_quantized.ckpt"):
        engine = load_model(model).engine
        logits.append(engine.forward(prompt, engine.allocate(1, 8), every=True))
    assert np.array_equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("runs/llama", "runs/llama/quantized/int8-dynamic/llama_quantized.ckpt"),
        ("smollm2_135m.ckpt", "smollm2_135m-int8-dynamic/smollm2_135m_quantized.ckpt"),
    ],
)
def test_dynamic_checkpoint_lies_where_the_command_says(
    here: Path, smolctl: Callable[..., Called], model: str, expected: str
) -> None:
    shutil.copy("runs/llama/checkpoints/final.ckpt", "smollm2_135m.ckpt")
    called = smolctl("quantize", model, "--to", "int8-dynamic", "--no-measure", "--force", "--json")
    assert called.code == 0, called.err
    assert called.json["variants"][0]["checkpoint"] == expected
    assert f"written: {expected}" in called.err
    torch.load(expected, weights_only=True)
    assert smolctl("sample", expected, "--prompt", "the cat", "--max-tokens", "3").code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("inspect-config", "alone.ckpt"),
        ("count-params", "alone.ckpt"),
        ("sample", "alone.ckpt", "runs/llama", "--prompt", "the cat", "--max-tokens", "3"),
        ("quantize", "alone.ckpt", "--to", "int8", "--out", "again", "--windows", "2"),
        ("push", "alone.ckpt", "--local-dir", "page"),
        ("bench", "alone.ckpt", "--suite", "decode", "--repeats", "1"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_but_training_takes_a_dynamic_checkpoint_alone(
    here: Path, smolctl: Callable[..., Called], command: tuple[str, ...]
) -> None:
    make_quantized("runs/llama", "int8-dynamic")
    shutil.move("out/llama_quantized.ckpt", "alone.ckpt")
    shutil.rmtree("out")
    called = smolctl(*command)
    assert called.code == 0, called.err


@pytest.mark.parametrize(
    ("key", "value"), [("scheme", "nf4"), ("scheme", 8), ("scheme", "int4"), ("activations", "per-layer")]
)
def test_a_checkpoint_that_was_quantized_in_an_unknown_way_is_refused(
    here: Path, key: str, value: object
) -> None:
    make_quantized("runs/llama", "int8-dynamic")
    content = torch.load("out/llama_quantized.ckpt", weights_only=True)
    torch.save({**content, "quantization": {**content["quantization"], key: value}}, "odd.ckpt")
    with pytest.raises(InputError, match=rf"odd\.ckpt: quantization: {key}: "):
        open_source("odd.ckpt")


def test_dynamic_checkpoint_takes_nothing_of_its_source_along(here: Path) -> None:
    """Norms of a GGUF are views of the mapped file, and torch.save keeps all that a view looks at."""
    make_quantized("runs/llama", "gguf-q8_0", "files")
    make_quantized("files/llama-q8_0.gguf", "int8-dynamic", "out")
    state = torch.load("out/llama_quantized.ckpt", weights_only=True)["state_dict"]
    plain = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert plain
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in plain)


def test_dynamic_scheme_is_what_quantize_dynamic_makes(here: Path) -> None:
    """The stock call on the network of the source gives the same layers, and the layers the same output."""
    from torch import nn
    from torch.ao.quantization import quantize_dynamic

    from smolctl.model.dynamic import silence
    from smolctl.model.weights import load_network

    make_quantized("runs/llama", "int8-dynamic")
    with silence():
        stock = quantize_dynamic(load_network(open_source("runs/llama")), {nn.Linear}, dtype=torch.qint8)
    engine = load_model("out").engine
    assert isinstance(engine, TorchEngine)
    # Only the tied head differs: ours is quantized, the stock call keeps the table in float32.
    hidden = torch.randn(1, 4, 32)
    theirs, ours = (network.model.layers[0] for network in (stock, engine.network))
    assert torch.equal(theirs(hidden, None, None), ours(hidden, None, None))


def test_foreign_pickles_are_not_taken_for_a_quantized_checkpoint(here: Path) -> None:
    torch.save({"quantization": {"scheme": "int8-dynamic"}, "state_dict": {}}, "odd.ckpt")
    with pytest.raises(InputError, match=r"odd\.ckpt: has no config"):
        open_source("odd.ckpt")
