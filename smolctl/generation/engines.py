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
from smolctl.generation.native_engine import KINDS, NativeEngine, Stored
from smolctl.generation.torch_engine import TorchEngine
from smolctl.model.dynamic import dynamic_network
from smolctl.model.weights import check_state, from_state
from smolctl.native.library import Library, load_library
from smolctl.sources.base import ModelSource
from smolctl.sources.quantized.packed import PackedMatrix
from smolctl.sources.quantized.scaled import ScaledMatrix, StoredTensor, dense
from smolctl.sources.shapes import HEAD, TABLE


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
    given: dict[str, StoredTensor] = {}
    for name, stored in source.require_weights().stored():
        if options.dtype and isinstance(stored, Tensor) and stored.dim() > 1:
            stored = stored.to(getattr(torch, options.dtype))
        given[name] = stored
    given = check_state(config, given, source.id)
    if any(isinstance(stored, ScaledMatrix) for stored in given.values()):
        return _dynamic_engine(source, given)
    weights = cast(dict[str, Stored], given)
    library = load_library() if options.engine != "torch" else ""
    matrices = (stored for stored in weights.values() if isinstance(stored, Tensor) and stored.dim() > 1)
    dtypes = {matrix.dtype for matrix in matrices}
    if isinstance(library, Library) and dtypes <= KINDS.keys():
        kind = kind_of(weights)
        # Where all weights are float32, so is everything else: the same words as any other engine's.
        cache = torch.float32 if kind == "float32" else torch.float16
        return _describe(NativeEngine(library, config, weights, cache, kind=kind), weights)
    if options.engine == "native":
        why = library if isinstance(library, str) else f"it does not read {', '.join(map(str, dtypes))}"
        raise UsageError(f"the native engine cannot run here: {why}", "Leave out --engine.")
    note = f"slower, on PyTorch: {library}" if isinstance(library, str) and library else ""
    return _torch_engine(config, weights, source.id, note)


def _torch_engine(config: ModelConfig, weights: Mapping[str, Stored], origin: str, note: str) -> Engine:
    tensors = {name: dense(stored) for name, stored in weights.items()}
    network = from_state(config, tensors, origin).eval().requires_grad_(False)
    packed = any(isinstance(stored, PackedMatrix) for stored in weights.values())
    name = f"torch cpu, {kind_of(weights)} as float32" if packed else ""
    return _describe(TorchEngine(network, note, name), tensors)


def _dynamic_engine(source: ModelSource, stored: Mapping[str, StoredTensor]) -> TorchEngine:
    activations = str((source.quantization or {}).get("activations", "per-tensor"))
    network = dynamic_network(source.require_config(), stored, activations)
    engine = TorchEngine(network, name=f"torch cpu, int8 weights, activations {activations}")
    engine.precision = "int8-dynamic"
    engine.weight_bytes = sum(tensor.bytes for tensor in source.tensors or () if len(tensor.shape) > 1)
    return engine


def _describe(engine: Engine, weights: Mapping[str, Stored]) -> Engine:
    """Record the precision of an engine's matrices and how many of their bytes a token reads."""
    engine.precision, engine.weight_bytes = kind_of(weights), read_bytes(weights)
    return engine


def read_bytes(weights: Mapping[str, Stored]) -> int:
    """Bytes of the matrices that every token is multiplied with; of a table for lookup it reads a row."""
    tables = {"model.embed_positions.weight"} | ({TABLE} if HEAD in weights else set())
    return sum(
        stored.bytes if isinstance(stored, PackedMatrix) else stored.numel() * stored.element_size()
        for name, stored in weights.items()
        if name not in tables and len(stored.shape) > 1
    )


def kind_of(weights: Mapping[str, Stored]) -> str:
    """What the matrices are, the most numerous weights first: "int4 + int8"."""
    sizes: dict[str, int] = {}
    for stored in weights.values():
        if isinstance(stored, PackedMatrix):
            kind, size = f"int{stored.bits}", stored.shape[0] * stored.shape[1]
        elif stored.dim() > 1:
            kind, size = str(stored.dtype).removeprefix("torch."), stored.numel()
        else:
            continue
        sizes[kind] = sizes.get(kind, 0) + size
    return " + ".join(sorted(sizes, key=lambda kind: -sizes[kind]))
