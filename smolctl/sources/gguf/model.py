"""A GGUF file as a MODEL: converts llama.cpp's keys and names to Hugging Face's."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolctl.config import ModelConfig, RopeScaling
from smolctl.config.load import resolve_model_config
from smolctl.errors import InputError
from smolctl.mapped import watch
from smolctl.outside import fitting
from smolctl.sources.base import DAMAGED, ModelSource, SourceKind, TensorHeader, TokenizerFiles, Weights
from smolctl.sources.gguf.header import GGUFHeader, GGUFTensor, as_written, read_header
from smolctl.sources.gguf.tokenizer import read_tokenizer, special_ids
from smolctl.sources.huggingface.tokenizer import tokenizer_reader
from smolctl.sources.meta import halves
from smolctl.sources.shapes import check_tensors, is_derived, no_rope_layers

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
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp's architectures and their implied settings. No key states which of SmolLM3's layers have no RoPE:
# llama.cpp assumes every fourth.
NO_ROPE_INTERVAL = 4
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "smollm3": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"use_qk_norm": True},
}
QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
ROPE_FACTORS = "rope_freqs.weight"  # divisors of RoPE's frequencies
LLAMA3_BOUNDS = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT, DEFAULT_THETA, CONTEXT = 8_192, 10_000.0, "max_position_embeddings"
INTERLEAVED = ("llama", "smollm3")  # architectures whose heads llama.cpp rotates by neighbours
ORIGINAL_CONTEXT = "rope.scaling.original_context_length"
PART = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")
MAX_PARTS = 1_000
LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")
# Metadata that, if truthy, changes the computation in ways that this network does not support.
OFF_SWITCHES = (
    "expert_count",
    "attention.sliding_window",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "attention.scale",
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_parallel_residual",
)
# Sizes that some models specify per layer.
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
# For a file with a vocabulary only, such as those of llama.cpp's tests.
TIE_ASSUMED = "tie_word_embeddings true is assumed: a file without tensors does not show it"


def open_gguf(path: Path, name: str) -> ModelSource:
    """Open a GGUF file by its header.

    Args:
        path: the file.
        name: the user's name for it.

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
    assumed = (TIE_ASSUMED,) if config and not tensors else ()
    return ModelSource(
        kind=SourceKind.GGUF,
        id=name,
        config=config,
        unsupported=unsupported,
        missing_parts=missing,
        declared={key: value for key, value in header.metadata.items() if not _is_long(value)},
        tensors=tensors or None,
        problems=check_tensors(config, tensors) if config and tensors else assumed,
        assumptions=assumed,
        weights=GGUFWeights(header, config) if config and tensors else None,
        tokenizer_reader=lambda: _tokenizer(header),
    )


def _tokenizer(header: GGUFHeader) -> TokenizerFiles | None:
    """The tokenizer in a file; if that cannot be read or there is none, the one next to it."""
    beside = tokenizer_reader(header.path.parent)
    try:
        return read_tokenizer(header) or (beside() if beside else None)
    except InputError:
        if beside is None:
            raise
        return beside()


def _with_all_parts(header: GGUFHeader) -> tuple[GGUFHeader, str]:
    """The header of a model that is split into several files: metadata of the first, tensors of all.

    Returns:
        The header, and the missing parts; "" if none is missing.
    """
    count, name = header.metadata.get("split.count"), PART.fullmatch(header.path.name)
    if type(count) is not int or count < 2:
        return header, ""
    if not name:
        return header, f"one of {count} parts, whose file name does not have llama.cpp's form for parts"
    numbers = range(1, min(count, MAX_PARTS) + 1)
    paths = {number: header.path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf") for number in numbers}
    parts = {number: read_header(path) for number, path in paths.items() if path.is_file()}
    missing = [str(number) for number in numbers if number not in parts]
    metadata = {**header.metadata, **(parts[1].metadata if 1 in parts else {})}
    tensors = tuple(tensor for number in sorted(parts) for tensor in parts[number].tensors)
    found = GGUFHeader(header.path, header.version, metadata, tensors)
    return found, f"part {', '.join(missing[:5])} of {count} is not beside it" if missing else ""


def _is_long(value: Any) -> bool:
    """Whether a value is a vocabulary or template, which is too long to be shown among the settings."""
    return not isinstance(value, str | int | float | bool) or (isinstance(value, str) and len(value) > 200)


def huggingface_name(name: str) -> str:
    """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`; unknown names unchanged."""
    layer = LAYER_NAME.fullmatch(name)
    stem, dot, suffix = (layer[2] if layer else name).rpartition(".")
    if stem not in NAMES:
        return name
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{NAMES[stem]}{dot}{suffix}"


def unsupported_feature(header: GGUFHeader) -> str:
    """The first unsupported feature of the file; "" if there is none."""
    architecture, values = header.metadata.get("general.architecture"), model_keys(header)
    parts = header.metadata.get("split.count")
    if parts not in (None, 0, 1):
        return f"a split GGUF of {parts} parts is not supported: join them with llama-gguf-split --merge"
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        return f"a GGUF of type {kind} is not a model"
    if architecture not in tuple(ARCHITECTURES):
        return f"GGUF architecture {architecture} is not supported, only {', '.join(ARCHITECTURES)}"
    for key in REQUIRED:
        if key not in values:
            return f"a GGUF without {architecture}.{key} is not supported"
    for key in OFF_SWITCHES:
        if values.get(key):
            return f"{architecture}.{key} {values[key]} is not supported"
    if not values.get("attention.causal", True):
        return "attention to later tokens is not supported"
    for tensor in header.tensors:
        if tensor.name.endswith(".bias") and not (
            architecture == "qwen2" and tensor.name.endswith(QKV_BIASES)
        ):
            return f"biases are not supported ({tensor.name})"
    unsupported = _unsupported_rope(values) or _unsupported_heads(values, architecture)
    if not unsupported and rope_factors(header) and _rope_scaling(header) is None:
        return f"rope scaling other than Llama 3's is not supported ({ROPE_FACTORS})"
    return unsupported


def model_keys(header: GGUFHeader) -> dict[str, Any]:
    """The metadata of the network, without the architecture's name that starts each key."""
    prefix = f"{header.metadata.get('general.architecture')}."
    return {
        key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)
    }


def rope_factors(header: GGUFHeader) -> tuple[float, ...]:
    """The divisor of each RoPE frequency; empty if the file has none.

    Raises:
        InputError: the file is truncated.
    """
    for tensor in header.tensors:
        if tensor.name == ROPE_FACTORS and tensor.type == "F32":
            with header.path.open("rb") as file:
                file.seek(tensor.offset)
                raw = file.read(tensor.bytes)
            if len(raw) < tensor.bytes:
                raise InputError(f"{header.path}: truncated inside {tensor.name}", DAMAGED)
            return struct.unpack(f"<{len(raw) // 4}f", raw)
    return ()


def _rope_scaling(header: GGUFHeader) -> RopeScaling | None:
    """Llama 3's scaling with the factors of the file; None if there are none, or others.

    The two bounds are the same in all models of Llama 3 and are not in the file. The largest factor is that
    of the slow rotations.
    """
    values, factors = model_keys(header), rope_factors(header)
    if not factors:
        return None
    context = values.get(ORIGINAL_CONTEXT, LLAMA3_CONTEXT)
    scaling = fitting(
        RopeScaling, {**LLAMA3_BOUNDS, "factor": as_written(max(factors)), f"original_{CONTEXT}": context}
    )
    theta = as_written(values.get("rope.freq_base", DEFAULT_THETA))
    expected = scaling and llama3_factors(scaling, theta, _head_dim(values))
    if not expected or len(expected) != len(factors):
        return None
    same = all(abs(one / other - 1) < 1e-4 for one, other in zip(factors, expected, strict=True))
    return scaling if same else None


def llama3_factors(scaling: RopeScaling, theta: float, head_dim: int) -> list[float]:
    """The divisor that a scaling gives the frequency of each pair of a head."""
    frequencies = [theta ** (-index / head_dim) for index in range(0, head_dim, 2)]
    return [one / scaling.slowed(one) for one in frequencies]


def _unsupported_rope(values: Mapping[str, Any]) -> str:
    scaling = values.get("rope.scaling.type", "none")
    if scaling != "none":
        return f"rope scaling {scaling} is not supported"
    # Older converters wrote only the factor.
    factors = (values.get("rope.scaling.factor", 1.0), values.get("rope.scale_linear", 1.0))
    return "" if all(factor in (0.0, 1.0) for factor in factors) else "rope scaling linear is not supported"


def _unsupported_heads(values: Mapping[str, Any], architecture: str) -> str:
    for key in SIZES:
        if not isinstance(values.get(key, 0), int):
            return f"{architecture}.{key} that is not one number is not supported"
    head_dim = _head_dim(values)
    rotated = values.get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        return f"partial rotation ({rotated} of head_dim {head_dim}) is not supported"
    if values.get("attention.value_length", head_dim) != head_dim:
        return "keys and values of different size are not supported"
    return ""


def _head_dim(values: Mapping[str, Any]) -> int:
    hidden, heads = values.get("embedding_length", 0), values.get("attention.head_count", 0)
    return int(values.get("attention.key_length", hidden // heads if heads else 0))


def read_config(header: GGUFHeader) -> ModelConfig:
    """The network described by the keys of its architecture.

    Raises:
        InputError: a value is not valid.
    """
    values, architecture = model_keys(header), header.metadata["general.architecture"]
    fields = {field: values[key] for key, field in REQUIRED.items()}
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    rows = shapes.get("token_embd.weight") or (len(header.metadata.get("tokenizer.ggml.tokens", ())),)
    fields |= {
        "vocab_size": values.get("vocab_size", rows[0]),
        "num_key_value_heads": values.get("attention.head_count_kv", fields["num_attention_heads"]),
        "head_dim": _head_dim(values),
        "rope_theta": as_written(values.get("rope.freq_base", DEFAULT_THETA)),
        "rope_scaling": _rope_scaling(header),
        "rms_norm_eps": as_written(fields["rms_norm_eps"]),
        "position_embedding": "rope",
        "residual_scale": 1.0,
        "tie_word_embeddings": "output.weight" not in shapes,
        **ARCHITECTURES[architecture],
        **special_ids(header.metadata),
    }
    if architecture == "smollm3":
        fields["no_rope_layers"] = no_rope_layers(fields["num_hidden_layers"], NO_ROPE_INTERVAL)
    return resolve_model_config(fields, str(header.path))


class GGUFWeights(Weights):
    """Tensors from the file, one at a time, in their stored form if a `PackedMatrix` or an array supports
    it.
    """

    def __init__(self, header: GGUFHeader, config: ModelConfig) -> None:
        self.header, self.config = header, config

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        from smolctl.sources.gguf.blocks import as_stored
        from smolctl.sources.quantized.scaled import dense

        for tensor, raw in self._raw():
            try:
                found = as_stored(raw, tensor.type)
            except InputError as error:
                raise InputError(f"{self.header.path}: {tensor.name}: {error.message}", error.hint) from None
            matrix = len(tensor.shape) > 1
            yield huggingface_name(tensor.name), found if matrix else dense(found).reshape(tensor.shape)

    def _raw(self) -> Iterator[tuple[GGUFTensor, Array]]:
        """Every tensor's bytes, (rows, bytes per row), mapped one at a time, so that memory never contains
        all of them.
        """
        import numpy as np

        path = self.header.path
        watch(path)
        for tensor in self.header.tensors:
            if is_derived(tensor.name):
                continue
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

        llama.cpp rotates neighbours (0, 1), (2, 3), ... and Hugging Face rotates halves (0, D/2), (1, D/2 +
        1), ..., so converters interleave the two halves of every head. This undoes the interleaving. For
        Qwen's architectures, llama.cpp rotates halves as well.
        """
        if self.header.metadata["general.architecture"] not in INTERLEAVED:
            return raw
        heads = {
            "attn_q.weight": self.config.num_attention_heads,
            "attn_k.weight": self.config.num_key_value_heads,
        }.get(tensor.name.split(".", 2)[-1])
        return raw if heads is None else halves(raw, heads)
