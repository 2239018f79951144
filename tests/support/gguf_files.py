"""Tiny GGUF files, written with the `gguf` package as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from smolctl.config import ModelConfig
from smolctl.sources.gguf.k_quants import K_QUANTS
from smolctl.sources.gguf.model import NAMES

BACK = {theirs: ours for ours, theirs in NAMES.items()}
# The largest scale × the largest value of a block, as integers.
LARGEST = {"Q2_K": 15 * 3, "Q3_K": 32 * 4, "Q4_K": 63 * 15, "Q5_K": 63 * 31, "Q6_K": 128 * 32}


def gguf_name(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` as `blk.0.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{BACK[rest]}.weight"
    return f"{BACK[stem]}.weight"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of Q and K: the halves of every head take turns."""
    size = rows.shape[0] // heads
    order = [
        head * size + half * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return np.ascontiguousarray(rows[order])


def random_blocks(
    rows: int, columns: int, kind: gguf.GGMLQuantizationType, factors: Sequence[float] = ()
) -> np.ndarray:
    """Random K-quants, uint8 (rows, bytes per row).

    Args:
        factors: what the float16 numbers of a block are drawn from; empty: one for weights of up to 0.2.
    """
    factors = factors or [0.2 / LARGEST[kind.name]]
    draw = np.random.default_rng(rows)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = draw.integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    fields = raw.view(np.dtype(K_QUANTS[kind.name][2]))
    for name in {"d", "dmin"}.intersection(fields.dtype.names or ()):
        fields[name] = draw.choice(factors, fields[name].shape)
    return raw


def write_gguf(
    path: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    architecture: str = "llama",
) -> Path:
    """A network as GGUF; matrices are stored as `kind`, vectors in float32.

    The `gguf` package reads K-quants but does not write them: a matrix of such a kind is a random one.
    """
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
    }
    for key, value in sizes.items():
        if f"{architecture}.{key}" not in (metadata or {}):
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_theta)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in state.items():
        values = tensor.detach().float().numpy()
        turns = heads.get(name.split(".")[-2])
        if turns:
            values = interleaved(values, turns)
        stored = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        if stored.name in K_QUANTS:
            raw = random_blocks(values.shape[0], values.shape[1], stored)
        else:
            raw = gguf.quants.quantize(values, stored)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
