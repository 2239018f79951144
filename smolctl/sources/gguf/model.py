"""A GGUF file as a MODEL: llama.cpp's keys and names turned into Hugging Face's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolctl.config import ModelConfig
from smolctl.config.load import resolve_model_config
from smolctl.errors import InputError
from smolctl.sources.base import DAMAGED, ModelSource, SourceKind, TensorHeader, TokenizerFiles, Weights
from smolctl.sources.gguf.header import GGUFHeader, GGUFTensor, as_written, read_header
from smolctl.sources.gguf.tokenizer import read_tokenizer, special_ids
from smolctl.sources.huggingface.tokenizer import tokenizer_reader
from smolctl.sources.shapes import check_tensors

if TYPE_CHECKING:
    from smolctl.sources.arrays import Array
    from smolctl.sources.quantized.scaled import StoredTensor

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PART = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")
MAX_PARTS = 1_000
LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")
# Metadata that changes the computation in ways this network does not have, when set to anything truthy.
OFF_SWITCHES = (
    "expert_count",
    "attention.sliding_window",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
)
# Sizes that some models give layer by layer.
SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
KEYS = SIZES | {
    "vocab_size": "vocab_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL = ("vocab_size", "num_key_value_heads", "head_dim", "rope_theta")
REQUIRED = {key: field for key, field in KEYS.items() if field not in OPTIONAL}


def open_gguf(path: Path, name: str) -> ModelSource:
    """Read the header of a GGUF file.

    Args:
        path: the file.
        name: how the user called it.

    Raises:
        InputError: the file is damaged, or lacks a key that every Llama has.
    """
    header, missing = _with_all_parts(read_header(path))
    unsupported = unsupported_feature(header)
    config = None if unsupported else read_config(header)
    tensors = tuple(
        TensorHeader(
            huggingface_name(tensor.name) if config else tensor.name,
            tensor.shape,
            tensor.type,
            tensor.bytes,
        )
        for tensor in header.tensors
    )
    return ModelSource(
        kind=SourceKind.GGUF,
        id=name,
        config=config,
        unsupported=unsupported,
        missing_parts=missing,
        declared={key: value for key, value in header.metadata.items() if not _is_long(value)},
        tensors=tensors,
        problems=check_tensors(config, tensors) if config else (),
        weights=GGUFWeights(header, config) if config else None,
        tokenizer_reader=lambda: _tokenizer(header),
    )


def _tokenizer(header: GGUFHeader) -> TokenizerFiles | None:
    """The tokenizer in a file; where that cannot be read, or there is none, the one beside it."""
    beside = tokenizer_reader(header.path.parent)
    try:
        return read_tokenizer(header) or (beside() if beside else None)
    except InputError:
        if beside is None:
            raise
        return beside()


def _with_all_parts(header: GGUFHeader) -> tuple[GGUFHeader, str]:
    """The header of a model that is split over several files: metadata of the first, tensors of all.

    Returns:
        The header, and which parts do not lie beside the file; "" when none is missing.
    """
    count, name = header.metadata.get("split.count"), PART.fullmatch(header.path.name)
    if type(count) is not int or count < 2 or not name:
        return header, ""
    numbers = range(1, min(count, MAX_PARTS) + 1)
    paths = {number: header.path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf") for number in numbers}
    parts = {number: read_header(path) for number, path in paths.items() if path.is_file()}
    missing = [str(number) for number in numbers if number not in parts]
    metadata = {**header.metadata, **(parts[1].metadata if 1 in parts else {})}
    tensors = tuple(tensor for number in sorted(parts) for tensor in parts[number].tensors)
    found = GGUFHeader(header.path, header.version, metadata, tensors)
    return found, f"part {', '.join(missing[:5])} of {count} is not beside it" if missing else ""


def _is_long(value: Any) -> bool:
    """Vocabularies and templates, which nobody wants to read among the settings."""
    return not isinstance(value, str | int | float | bool) or (isinstance(value, str) and len(value) > 200)


def huggingface_name(name: str) -> str:
    """`blk.0.attn_q.weight` as `model.layers.0.self_attn.q_proj.weight`; unknown names as they are."""
    layer = LAYER_NAME.fullmatch(name)
    stem, dot, suffix = (layer[2] if layer else name).rpartition(".")
    if stem not in NAMES:
        return name
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{NAMES[stem]}{dot}{suffix}"


def unsupported_feature(header: GGUFHeader) -> str:
    """The first feature of the file that this network does not have; "" when there is none."""
    values = header.metadata
    architecture, parts = values.get("general.architecture"), values.get("split.count")
    if parts not in (None, 0, 1):
        return f"a split GGUF of {parts} parts is not supported: join them with llama-gguf-split --merge"
    kind = values.get("general.type", "model")
    if kind != "model":
        return f"a GGUF of type {kind} is no model"
    if architecture != "llama":
        return f"GGUF architecture {architecture} is not supported, only llama"
    for key in OFF_SWITCHES:
        if values.get(f"llama.{key}"):
            return f"llama.{key} {values[f'llama.{key}']} is not supported"
    for tensor in header.tensors:
        if tensor.name == "rope_freqs.weight":
            return "rope scaling llama3 (rope_freqs.weight) is not supported"
        if tensor.name.endswith(".bias"):
            return f"biases are not supported ({tensor.name})"
    return _unsupported_rope(values) or _unsupported_heads(values)


def _unsupported_rope(values: Mapping[str, Any]) -> str:
    scaling = values.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        return f"rope scaling {scaling} is not supported"
    # Older converters wrote the factor alone.
    factors = (values.get("llama.rope.scaling.factor", 1.0), values.get("llama.rope.scale_linear", 1.0))
    return "" if all(factor in (0.0, 1.0) for factor in factors) else "rope scaling linear is not supported"


def _unsupported_heads(values: Mapping[str, Any]) -> str:
    for key in SIZES:
        if not isinstance(values.get(f"llama.{key}", 0), int):
            return f"llama.{key} that is not one number is not supported"
    head_dim = _head_dim(values)
    rotated = values.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        return f"partial rotation ({rotated} of head_dim {head_dim}) is not supported"
    if values.get("llama.attention.value_length", head_dim) != head_dim:
        return "keys and values of different size are not supported"
    return ""


def _head_dim(values: Mapping[str, Any]) -> int:
    explicit = values.get("llama.attention.key_length")
    hidden, heads = values.get("llama.embedding_length", 0), values.get("llama.attention.head_count", 0)
    return int(explicit or (hidden // heads if heads else 0))


def read_config(header: GGUFHeader) -> ModelConfig:
    """The network that the `llama.*` keys describe.

    Raises:
        InputError: a key is missing or its value makes no sense.
    """
    values = header.metadata
    missing = [f"llama.{key}" for key in REQUIRED if f"llama.{key}" not in values]
    if missing:
        raise InputError(
            f"{header.path}: the metadata has no {missing[0]}", "Convert the model to GGUF again."
        )
    fields = {field: values[f"llama.{key}"] for key, field in REQUIRED.items()}
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    vocab = values.get("llama.vocab_size") or shapes.get("token_embd.weight", (0,))[0]
    fields |= {
        "vocab_size": vocab,
        "num_key_value_heads": values.get("llama.attention.head_count_kv") or fields["num_attention_heads"],
        "head_dim": _head_dim(values),
        "rope_theta": as_written(values.get("llama.rope.freq_base", 10_000.0)),
        "rms_norm_eps": as_written(fields["rms_norm_eps"]),
        "position_embedding": "rope",
        "residual_scale": 1.0,
        "tie_word_embeddings": "output.weight" not in shapes,
        **special_ids(values),
    }
    return resolve_model_config(fields, str(header.path))


class GGUFWeights(Weights):
    """Tensors one by one from the file, in what a `PackedMatrix` or an array can hold as it is stored."""

    def __init__(self, header: GGUFHeader, config: ModelConfig) -> None:
        self.header, self.config = header, config

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        from smolctl.sources.gguf.blocks import as_stored
        from smolctl.sources.quantized.scaled import dense

        for tensor, raw in self._raw():
            found = as_stored(raw, tensor.type)
            matrix = len(tensor.shape) > 1
            yield huggingface_name(tensor.name), found if matrix else dense(found).reshape(tensor.shape)

    def _raw(self) -> Iterator[tuple[GGUFTensor, Array]]:
        """Every tensor's bytes, (rows, bytes per row), mapped one by one: memory never holds all."""
        import numpy as np

        path = self.header.path
        for tensor in self.header.tensors:
            try:
                raw = np.asarray(np.memmap(path, np.uint8, "c", tensor.offset, (tensor.bytes,)))
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error})", DAMAGED) from None
            except ValueError:
                raise InputError(
                    f"{path}: truncated: {tensor.name} ends past the end of the file", DAMAGED
                ) from None
            rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
            yield tensor, self._reordered(tensor, raw.reshape(rows, -1))

    def _reordered(self, tensor: GGUFTensor, raw: Array) -> Array:
        """Rows of Q and K in Hugging Face's order.

        llama.cpp rotates neighbours (0, 1), (2, 3), ... and Hugging Face rotates halves (0, D/2),
        (1, D/2 + 1), ..., so that converters interleave the two halves of every head. This undoes it.
        """
        heads = {
            "attn_q.weight": self.config.num_attention_heads,
            "attn_k.weight": self.config.num_key_value_heads,
        }.get(tensor.name.split(".", 2)[-1])
        if heads is None or raw.shape[0] % (2 * heads):
            return raw
        rows, width = raw.shape
        return raw.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
