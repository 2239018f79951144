"""Answers that must not depend on the instructions that a CPU has.

    python -m tests.support.instruction_sets FILE [MODEL…]

writes them as this process computes them; `computed_with` starts such a process with fewer instructions.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from smolctl.generation.engines import EngineOptions, make_engine
from smolctl.generation.load import load_model
from smolctl.model.dynamic import dynamic_network
from smolctl.native.library import OVERRIDE
from smolctl.quantization.measure import PROMPTS
from smolctl.quantization.rounding import quantize_matrix
from smolctl.sources.base import ModelSource, SourceKind, StateWeights
from smolctl.sources.quantized.scaled import ScaledMatrix, StoredTensor, dense
from tests.support.processes import ADDRESS, call
from tests.support.tiny_models import tiny_network

# The commonest kind of CPU has AVX2 and no VNNI. Each library reads a variable of its own, once.
AVX2 = {
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    OVERRIDE: "avx2",
}
CONFIG = tiny_network(position_embedding="rope", residual_scale=1.0).config


def _integers(rows: int, columns: int, seed: int) -> ScaledMatrix:
    """A matrix with as many large values as small ones, unlike real ones: it finds sums that are cut off."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return ScaledMatrix(values.numpy(), np.full(rows, columns**-0.5 / 64, np.float32))


def answers() -> dict[str, Tensor]:
    """Logits (T, V) of one small network in every way that its matrices of integers can be multiplied."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in dynamic_network(CONFIG, {}).state_dict().items()}
    shapes = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    stored: dict[str, StoredTensor] = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else _integers(shape[0], shape[1], seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    ids = torch.arange(24)
    found = {}
    for activations in ("per-tensor", "per-token"):
        with torch.inference_mode():
            found[activations] = dynamic_network(CONFIG, stored, activations)(ids[None])[0]
    floats = {name: dense(one) for name, one in stored.items()}
    for bits in (8, 4):
        packed = {
            name: one if one.ndim == 1 else quantize_matrix(torch.from_numpy(one), bits, 32)
            for name, one in floats.items()
        }
        source = ModelSource(SourceKind.QUANTIZED, "test", CONFIG, weights=StateWeights(packed))
        for engine in ("torch", "native"):
            made = make_engine(source, EngineOptions(engine))
            logits = made.forward([ids.tolist()], made.allocate(1, 24), every=True)
            found[f"int{bits} {engine}"] = torch.from_numpy(logits)
    return found


def predictions(models: Sequence[str]) -> dict[str, Tensor]:
    """Logits (T, V) of each model on a short text."""
    found = {}
    for model in models:
        loaded = load_model(model)
        ids = loaded.tokenizer.encode("".join(PROMPTS))
        cache = loaded.engine.allocate(1, len(ids))
        found[model] = torch.from_numpy(loaded.engine.forward([ids], cache, every=True))
    return found


def computed_with(environment: Mapping[str, str], models: Sequence[str] = ()) -> dict[str, Tensor]:
    """`answers`, or `predictions`, of a new process: a forked one would have chosen its kernels already."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.delenv(ADDRESS, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        called = call(file := Path(folder) / "answers", *models, module=__name__)
        assert called.code == 0, called.err
        found: dict[str, Tensor] = torch.load(file)
    return found


if __name__ == "__main__":
    torch.save(predictions(sys.argv[2:]) if sys.argv[2:] else answers(), sys.argv[1])
