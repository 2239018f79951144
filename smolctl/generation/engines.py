"""The choice of the engine for a model: the compiled one if it supports the model, else PyTorch.

PyTorch is imported only if it runs a model, because importing it takes longer than the compiled engine takes
for an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from smolctl.cores import compute_threads
from smolctl.errors import UsageError
from smolctl.generation.engine import Engine
from smolctl.generation.native_engine import KINDS, NativeEngine, Stored
from smolctl.native.library import Library, load_library
from smolctl.sources.arrays import Array, as_bfloat16, as_float32, name_of
from smolctl.sources.base import ModelSource
from smolctl.sources.quantized.scaled import ScaledMatrix, StoredTensor
from smolctl.sources.shapes import check_state


@dataclass(frozen=True)
class EngineOptions:
    """Options for running a model."""

    engine: Literal["auto", "native", "torch"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # for dense weights; None: as in the file
    threads: int | None = None  # see `compute_threads`; PyTorch uses the process's setting
    kv_cache: Literal["auto", "int8"] = "auto"  # auto: see `cache_dtype_of`


def make_engine(source: ModelSource, options: EngineOptions) -> Engine:
    """The engine for a source.

    Matrices made by PyTorch's `quantize_dynamic` are kept and run in PyTorch.

    Raises:
        SmolError: the weights are damaged or do not fit the config, or `options` selects an engine that this
            installation does not have.
    """
    config = source.require_config()
    read: dict[str, StoredTensor] = {}
    for name, stored in source.require_weights().stored():
        if options.dtype and isinstance(stored, np.ndarray) and stored.ndim > 1:
            stored = _converted(name, stored, options.dtype)
        read[name] = stored
    given = check_state(config, read, source.id)
    weights: dict[str, Stored] = {
        name: stored for name, stored in given.items() if not isinstance(stored, ScaledMatrix)
    }
    if len(weights) < len(given):
        return _torch_engine(source, given, options)
    library = load_library() if options.engine != "torch" else ""
    dtypes = {one.dtype for one in weights.values() if isinstance(one, np.ndarray) and one.ndim > 1}
    if isinstance(library, Library) and dtypes <= KINDS.keys():
        return NativeEngine(
            library, config, weights, compute_threads(options.threads), options.kv_cache == "int8"
        )
    if options.engine == "native":
        unread = ", ".join(sorted(map(name_of, dtypes)))
        why = library if isinstance(library, str) else f"it does not read {unread}"
        raise UsageError(f"the native engine cannot run here: {why}", "Leave out --engine.")
    note = f"slower, using PyTorch: {library}" if isinstance(library, str) and library else ""
    return _torch_engine(source, weights, options, note)


def _converted(name: str, matrix: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return as_bfloat16(matrix)
    values = as_float32(matrix)
    with np.errstate(over="ignore"):
        converted: Array = values.astype(dtype, copy=False)
    if not np.isfinite(converted).all() and np.isfinite(values).all():
        raise UsageError(
            f"--dtype float16: {name} has values above 65,504, which float16 cannot represent",
            "Use bfloat16.",
        )
    return converted


def _torch_engine(
    source: ModelSource, stored: Mapping[str, StoredTensor], options: EngineOptions, note: str = ""
) -> Engine:
    from smolctl.generation.torch_engine import open_torch_engine

    if options.kv_cache == "int8":
        raise UsageError(
            "--kv-cache int8 needs the native engine, and PyTorch would run this model", "Leave it out."
        )

    return open_torch_engine(source, stored, note, options.threads)
