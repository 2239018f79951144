"""Which engine runs a model: the compiled one where it can, PyTorch everywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from smolctl.config import ModelConfig
from smolctl.errors import UsageError
from smolctl.generation.engine import Engine
from smolctl.generation.native_engine import KINDS, NativeEngine, Stored, kind_of, read_bytes
from smolctl.generation.torch_engine import TorchEngine
from smolctl.model.dynamic import dynamic_network
from smolctl.model.weights import check_state, from_state
from smolctl.native.library import Library, load_library
from smolctl.sources.base import ModelSource
from smolctl.sources.quantized.packed import PackedMatrix
from smolctl.sources.quantized.scaled import ScaledMatrix, StoredTensor, dense


@dataclass(frozen=True)
class EngineOptions:
    """How to run a model; every engine takes as many threads as `torch.get_num_threads` says."""

    engine: Literal["auto", "native", "torch"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of dense weights; None keeps the file's


def make_engine(source: ModelSource, options: EngineOptions) -> Engine:
    """The engine for a source.

    Matrices that PyTorch's `quantize_dynamic` made stay as they are and run there.

    Raises:
        SmolError: the weights are damaged, do not fit the config, or `options` asks for an engine that
            this installation does not have.
    """
    config = source.require_config()
    read: dict[str, StoredTensor] = {}
    for name, stored in source.require_weights().stored():
        if options.dtype and isinstance(stored, Tensor) and stored.dim() > 1:
            stored = _converted(name, stored, options.dtype)
        read[name] = stored
    given = check_state(config, read, source.id)
    if any(isinstance(stored, ScaledMatrix) for stored in given.values()):
        return _dynamic_engine(source, given)
    weights = cast(dict[str, Stored], given)
    library = load_library() if options.engine != "torch" else ""
    matrices = (stored for stored in weights.values() if isinstance(stored, Tensor) and stored.dim() > 1)
    dtypes = {matrix.dtype for matrix in matrices}
    if isinstance(library, Library) and dtypes <= KINDS.keys():
        return NativeEngine(library, config, weights)
    if options.engine == "native":
        why = library if isinstance(library, str) else f"it does not read {', '.join(map(str, dtypes))}"
        raise UsageError(f"the native engine cannot run here: {why}", "Leave out --engine.")
    note = f"slower, on PyTorch: {library}" if isinstance(library, str) and library else ""
    return _torch_engine(config, weights, source.id, note)


def _converted(name: str, matrix: Tensor, dtype: str) -> Tensor:
    converted = matrix.to(getattr(torch, dtype))
    if dtype == "float16" and not converted.isfinite().all() and matrix.isfinite().all():
        raise UsageError(
            f"--dtype float16: {name} holds values above 65,504, which float16 cannot", "Take bfloat16."
        )
    return converted


def _torch_engine(config: ModelConfig, weights: Mapping[str, Stored], origin: str, note: str) -> Engine:
    tensors = {name: dense(stored) for name, stored in weights.items()}
    network = from_state(config, tensors, origin).eval().requires_grad_(False)
    packed = any(isinstance(stored, PackedMatrix) for stored in weights.values())
    name = f"torch cpu, {kind_of(weights)} as float32" if packed else ""
    engine = TorchEngine(network, note, name)
    engine.precision, engine.weight_bytes = kind_of(tensors), read_bytes(tensors)
    return engine


def _dynamic_engine(source: ModelSource, stored: Mapping[str, StoredTensor]) -> TorchEngine:
    activations = str((source.quantization or {}).get("activations", "per-tensor"))
    network = dynamic_network(source.require_config(), stored, activations)
    engine = TorchEngine(network, name=f"torch cpu, int8 weights, activations {activations}")
    engine.precision = "int8-dynamic"
    engine.weight_bytes = sum(tensor.bytes for tensor in source.tensors or () if len(tensor.shape) > 1)
    return engine
