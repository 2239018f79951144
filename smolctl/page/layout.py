"""The position of each tensor in a quantized folder's model.safetensors, for JavaScript.

The page puts the bytes of that file unchanged into the engine's memory. This module writes the fields of the
structures of forward.c, with offsets in the file instead of pointers: engine.js adds the address of the file,
and does not need the tensors' names or the format.

A matrix is [kind, rows, columns, group, values, scales, offsets] as in matrix.h; an offset of 0, where the
file's own header is, means none. A tensor that is read as floats has an eighth number: its columns without
padding. Single numbers are written unchanged: 0 stands for a missing tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smolctl.errors import InputError
from smolctl.generation.native_engine import INTEGERS, KINDS, OPTIONAL, Stored, cache_dtype_of
from smolctl.model.positions import rotary_frequencies
from smolctl.sources.arrays import name_of
from smolctl.sources.huggingface.safetensors_file import read_header
from smolctl.sources.open import open_source
from smolctl.sources.quantized.packed import BLOCK, PackedMatrix
from smolctl.sources.quantized.scaled import ScaledMatrix, StoredTensor
from smolctl.sources.quantized_folder import FILE, OFFSETS, SCALES, VALUES
from smolctl.sources.shapes import HEAD, POSITIONS, TABLE

MAX_BYTES = 65_535 * 65_536  # whole pages of WebAssembly memory below 4 GiB, which some browsers refuse
REMEDY = "Use int8 or int4: `smolctl quantize MODEL --to int8`."


def engine_layout(quantized: Path) -> dict[str, Any]:
    """The layout of a folder that `quantize` wrote.

    Args:
        quantized: the folder.

    Returns:
        The input of engine.js as plain JSON.

    Raises:
        InputError: the folder is damaged, or of a kind that the page does not support.
    """
    source = open_source(str(quantized))
    config = source.require_config()
    places, size = _places(quantized / FILE)
    if size >= MAX_BYTES:
        raise InputError(
            f"{quantized}: {size:,} bytes of weights do not fit a page's memory, which is below 4 GiB",
            "Publish a smaller model, or one with fewer bits: `smolctl quantize MODEL --to int4`.",
        )
    weights = {name: _runnable(quantized, name, stored) for name, stored in source.require_weights().stored()}

    def matrix(name: str) -> list[int]:
        return _matrix(name, weights[name], places)

    def floats(name: str) -> list[int]:
        return _floats(name, weights[name], places)

    layers = []
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layers.append(
            [
                *(matrix(f"{prefix}self_attn.{name}_proj.weight") for name in "qkvo"),
                *(matrix(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up", "down")),
                floats(f"{prefix}input_layernorm.weight"),
                floats(f"{prefix}post_attention_layernorm.weight"),
                *(floats(prefix + name) if prefix + name in weights else 0 for name in OPTIONAL),
                int(config.rotates(index)),
            ]
        )
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "eps": config.rms_norm_eps,
        "residual_scale": config.residual_scale,
        "max_positions": config.max_position_embeddings,
        # Whether the KV cache is in float16.
        "half_precision": cache_dtype_of(config, weights) == np.float16,
        # The RoPE angle of each pair of a head from one position to the next; None: positions are learned.
        "frequencies": rotary_frequencies(config).tolist() if config.position_embedding == "rope" else None,
        "layers": layers,
        "table": matrix(TABLE),
        "head": matrix(HEAD if HEAD in weights else TABLE),
        "norm": floats("model.norm.weight"),
        "positions": floats(POSITIONS) if config.position_embedding == "learned" else None,
    }


def _places(path: Path) -> tuple[dict[str, int], int]:
    """Where each stored tensor begins in the file, and where the last one ends."""
    with path.open("rb") as file:
        position = 8 + int.from_bytes(file.read(8), "little")
    places = {}
    for tensor in read_header(path):  # in the order of their data, which has no gaps
        places[tensor.name] = position
        position += tensor.bytes
    return places, position


def _runnable(folder: Path, name: str, stored: StoredTensor) -> Stored:
    """A tensor that the page can run; others are refused."""
    if isinstance(stored, PackedMatrix):
        return stored
    if isinstance(stored, ScaledMatrix):
        raise InputError(f"{folder}: a browser cannot run the scheme int8-dynamic", REMEDY)
    if stored.dtype not in KINDS:
        raise InputError(f"{folder}: a browser cannot run {name}, which is {name_of(stored.dtype)}", REMEDY)
    if stored.ndim == 2 and name != POSITIONS and stored.shape[1] % BLOCK:
        raise InputError(
            f"{folder}: {name} is not quantized and has rows of {stored.shape[1]} values, "
            f"and a browser reads such rows in multiples of {BLOCK} only",
            "Quantize this matrix too: leave it out of --skip.",
        )
    return stored


def _matrix(name: str, stored: Stored, places: Mapping[str, int]) -> list[int]:
    rows, columns = stored.shape
    if isinstance(stored, PackedMatrix):
        parts = [places[name + VALUES], places[name + SCALES], places.get(name + OFFSETS, 0)]
        return [INTEGERS[stored.bits], rows, columns + -columns % BLOCK, stored.group, *parts]
    return [KINDS[stored.dtype], rows, columns, BLOCK, places[name], 0, 0]


def _floats(name: str, stored: Stored, places: Mapping[str, int]) -> list[int]:
    """A tensor that is read as floats: an unquantized one is a single row."""
    if isinstance(stored, PackedMatrix):
        return [*_matrix(name, stored, places), stored.columns]
    return [
        KINDS[stored.dtype],
        1,
        stored.size + -stored.size % BLOCK,
        BLOCK,
        places[name],
        0,
        0,
        stored.size,
    ]
