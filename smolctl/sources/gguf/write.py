"""Writes a Llama-like network with its tokenizer as one GGUF file, like llama.cpp's converter.

The file is written to a temporary name, read back with smolctl's own reader, compared with the input, and
only then renamed, so a file under the final name is always complete and correct.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smolctl.config import ModelConfig, Provenance
from smolctl.durable import folder_of, lack_of_room, replacing
from smolctl.errors import InputError, SmolError, UsageError
from smolctl.sources.base import TokenizerFiles
from smolctl.sources.gguf.header import read_header
from smolctl.sources.gguf.model import (
    INTERLEAVED,
    KEYS,
    LLAMA3_BOUNDS,
    NAMES,
    NO_ROPE_INTERVAL,
    ORIGINAL_CONTEXT,
    ROPE_FACTORS,
    llama3_factors,
    open_gguf,
)
from smolctl.sources.gguf.write_tokenizer import require_same_tokenizer, tokenizer_metadata
from smolctl.sources.provenance import gguf_metadata
from smolctl.sources.quantized.packed import BLOCK
from smolctl.sources.quantized.range import holds
from smolctl.sources.shapes import HEAD, TABLE, no_rope_layers

# Maximum rounding error as a share of the tensor's largest value: half a step, or a whole step if one end of
# the range sets the scale and the other end is clipped.
LARGEST_ERROR = {
    "f32": 0.0,
    "f16": 2**-11,
    "bf16": 2**-8,
    "q8_0": 1 / 127,
    "q5_1": 1.02 / 31,
    "q5_0": 1.02 / 16,
    "q4_1": 1.02 / 15,
    "q4_0": 1.02 / 8,
}
BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8, "q5_1": 5, "q5_0": 5, "q4_1": 4, "q4_0": 4}
WRITER_KEY, WRITER = "general.quantized_by", "smolctl"  # in files that smolctl may replace
SCALE_UNDERFLOW = 8e-6  # scales are float16 with a smallest step of 6e-8, times up to 127
SCHEMES = tuple(LARGEST_ERROR)
BLOCK_SCHEMES = tuple(scheme for scheme in SCHEMES if scheme.startswith("q"))
# Fields of a config that the file's keys do not contain, or contain in the tokenizer's keys.
NOT_IN_THE_FILE = {"attention_dropout", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"}


@dataclass(frozen=True)
class GGUFResult:
    """A file that was written and read back."""

    path: Path
    scheme: str
    bytes: int
    parameters: int
    largest_error: float  # of a value, as a share of its tensor's largest value
    wider: tuple[str, ...] = ()  # a line for each matrix that exceeds the scheme's range

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters


def require_scheme(scheme: str) -> None:
    """Check that GGUF files can be written in a scheme.

    Raises:
        UsageError: it is not known.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"GGUF scheme {scheme} is not known", f"Schemes: {', '.join(SCHEMES)}.")


def require_gguf(config: ModelConfig, scheme: str) -> None:
    """Check that a network can be written as a GGUF of this scheme, before anything is read.

    Raises:
        UsageError: there is no such scheme.
        InputError: the network cannot be written.
    """
    require_scheme(scheme)
    if config.position_embedding == "learned":
        raise InputError(
            "learned positions cannot be written as a GGUF: llama.cpp's llama architecture uses RoPE",
            "Train with position_embedding: rope and residual_scale: 1, such as smollm2-135m-hub.",
        )
    _require_same_rope(config)
    if config.residual_scale != 1.0:
        raise InputError(
            f"a model with residual_scale {config.residual_scale:g} cannot be written as a GGUF: "
            "llama.cpp's llama architecture adds its branches unscaled",
            "Train with residual_scale: 1, such as smollm2-135m-hub.",
        )
    rows = {
        "hidden_size": config.hidden_size,
        "num_attention_heads × head_dim": config.num_attention_heads * config.head_dim,
        "intermediate_size": config.intermediate_size,
    }
    for name, size in rows.items():
        if scheme in BLOCK_SCHEMES and size % BLOCK:
            raise InputError(
                f"GGUF {scheme} packs rows in blocks of {BLOCK}: {name} {size} is not divisible by it",
                "Use f16 or bf16, which have no blocks: with `quantize`, gguf-f16 or gguf-bf16.",
            )


def _require_same_rope(config: ModelConfig) -> None:
    """Check that llama.cpp, which uses defaults for missing keys, rotates heads like the network."""
    layers, scaling = config.num_hidden_layers, config.rope_scaling
    if config.no_rope_layers and config.no_rope_layers != tuple(no_rope_layers(layers, NO_ROPE_INTERVAL)):
        raise InputError(
            f"no_rope_layers {list(config.no_rope_layers)} cannot be written as a GGUF: "
            f"in llama.cpp exactly every {NO_ROPE_INTERVAL}th layer has no rope",
            "Leave out the GGUF.",
        )
    if scaling is None:
        return
    slowest = max(llama3_factors(scaling, config.rope_theta, config.head_dim))
    known = all(getattr(scaling, key) == bound for key, bound in LLAMA3_BOUNDS.items())
    if not known or abs(slowest / scaling.factor - 1) > 1e-6:
        raise InputError(
            "this rope_scaling cannot be written as a GGUF, which has no fields for it: "
            "low_freq_factor must be 1, high_freq_factor 4, and the slowest rotation scaled by factor",
            "Leave out the GGUF.",
        )


def write_gguf(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: TokenizerFiles,
    scheme: str,
    path: Path,
    name: str,
    provenance: Provenance | None = None,
) -> GGUFResult:
    """Write a network as GGUF.

    Matrices are stored in `scheme`, norms in float32. The 4- and 5-bit schemes store the token table (and an
    untied head) in q8_0, like published files, because it affects both ends of the network. A matrix with
    values outside the range of a scheme's float16 scales is stored in q8_0, or else in float32.

    Args:
        config: of the network.
        tensors: every tensor under its Hugging Face name; may include a head that equals a tied table.
        tokenizer: written into the file with its chat template.
        scheme: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.
        path: of the file; an existing file is replaced.
        name: of the model, `general.name`.
        provenance: of the weights; the file names its license and its model on the Hub.

    Returns:
        Facts about the file, after it was read back and compared.

    Raises:
        InputError: llama.cpp does not support the network, the tokenizer or the block size.
        SmolError: the file does not read back as written; then there is no file at `path`.
    """
    require_gguf(config, scheme)
    metadata = _model_metadata(config, scheme, name) | gguf_metadata(provenance)
    metadata |= tokenizer_metadata(tokenizer, config)
    state = {key: tensor.detach() for key, tensor in tensors}
    if config.tie_word_embeddings:
        state.pop(HEAD, None)
    blocks = {key: _block(key, tensor, scheme) for key, tensor in state.items()}
    needed = sum(_bytes(tensor, blocks[key]) for key, tensor in state.items())
    with folder_of(path):
        if lack := lack_of_room(path.parent, needed):
            raise SmolError(f"{path}: the GGUF {lack}", "Free some space or choose another place.")
        with replacing(path) as partial:
            _write(partial, metadata, state, config, blocks)
            try:
                error = _read_back(partial, state, config, tokenizer, blocks)
            except InputError as damage:  # a full disk may silently write less than requested
                raise SmolError(
                    f"{path}: cannot be written (reads back as: {damage.message})",
                    "Look at the disk's space and health.",
                ) from None
    parameters = sum(tensor.numel() for tensor in state.values())
    wider = tuple(
        f"{key} is stored as {block}: its values are outside the range of {scheme}"
        for key, block in blocks.items()
        if block != block_of(key, state[key].dim(), scheme)
    )
    return GGUFResult(path, scheme, path.stat().st_size, parameters, error, wider)


def is_own_gguf(path: Path) -> bool:
    """Whether smolctl wrote a file."""
    try:
        return read_header(path).metadata.get(WRITER_KEY) == WRITER
    except (InputError, OSError):
        return False


def block_of(name: str, dimensions: int, scheme: str) -> str:
    """The type of a tensor in a file of a scheme: tables keep 8 bits, vectors float32."""
    if dimensions == 1:
        return "f32"
    return "q8_0" if scheme in BLOCK_SCHEMES and name in (TABLE, HEAD) else scheme


def wider_blocks(block: str) -> tuple[str, ...]:
    """Fallbacks for a matrix whose values exceed a block type; the first suitable one is used."""
    return ("f32",) if block in ("q8_0", "f16", "bf16", "f32") else ("q8_0", "f32")


def _block(name: str, tensor: Tensor, scheme: str) -> str:
    """The type of a tensor with these values in a file of a scheme."""
    wanted = block_of(name, tensor.dim(), scheme)
    values = tensor.float().cpu()
    return next(block for block in (wanted, *wider_blocks(wanted)) if holds(block, values))


def _type(block: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[block.upper()]


def _bytes(tensor: Tensor, block: str) -> int:
    """Size of a tensor in a file."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[_type(block)]
    return int(tensor.numel() // values * size)


def _model_metadata(config: ModelConfig, scheme: str, name: str) -> dict[str, Any]:
    import gguf

    file_type = gguf.LlamaFileType["ALL_F32" if scheme == "f32" else f"MOSTLY_{scheme.upper()}"]
    return {
        "general.name": name,
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        WRITER_KEY: WRITER,
        **{f"{config.model_type}.{key}": getattr(config, field) for key, field in KEYS.items()},
    }


def _write(
    path: Path,
    metadata: Mapping[str, Any],
    state: Mapping[str, Tensor],
    config: ModelConfig,
    blocks: Mapping[str, str],
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, config.model_type)
    try:
        for key, value in metadata.items():
            kind = gguf.GGUFValueType.get_type(value)
            # llama.cpp requires unsigned sizes and ids.
            writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if type(value) is int else kind)
        if (scaling := config.rope_scaling) is not None:
            writer.add_uint32(
                f"{config.model_type}.{ORIGINAL_CONTEXT}", scaling.original_max_position_embeddings
            )
            factors = llama3_factors(scaling, config.rope_theta, config.head_dim)
            writer.add_tensor(ROPE_FACTORS, np.array(factors, np.float32))
        for name, tensor in state.items():
            stored = _type(blocks[name])
            values = _interleaved(name, tensor.float().cpu(), config).contiguous().numpy()
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise SmolError(
            f"{path.parent}: the GGUF cannot be written ({error.strerror or error})",
            "Free some space and try again.",
        ) from None
    finally:
        writer.close()


def gguf_name(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`.

    Raises:
        InputError: a Llama has no such tensor.
    """
    back = {ours: theirs for theirs, ours in NAMES.items()}
    stem, _, suffix = name.rpartition(".")
    prefix = ""
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        prefix = f"blk.{layer}."
    if stem not in back or suffix not in ("weight", "bias"):
        raise InputError(f"{name}: a GGUF of a Llama has no such tensor", "Export a Llama-shaped model.")
    return f"{prefix}{back[stem]}.{suffix}"


def _interleaved(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Rows of Q and K in llama.cpp's order: the two halves of every head interleaved, because it rotates
    pairs.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        name.split(".")[-2]
    )
    if heads is None or config.model_type not in INTERLEAVED:
        return tensor
    rows, width = tensor.shape
    return tensor.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def _read_back(
    path: Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: TokenizerFiles,
    blocks: Mapping[str, str],
) -> float:
    """Check all of the file; returns the largest error of a value as a share of its tensor's largest
    value.
    """
    source = open_gguf(path, path.name)
    if source.config is None or source.weights is None:
        raise _differs(source.unsupported)
    ours, theirs = (one.model_dump(exclude=NOT_IN_THE_FILE) for one in (config, source.config))
    for key, value in ours.items():
        # The file's numbers are float32.
        same = theirs[key] == value or (isinstance(value, float) and abs(theirs[key] / value - 1) < 1e-6)
        if not same:
            raise _differs(f"{key} is {theirs[key]}, expected {value}")
    missing = set(state)
    worst = 0.0
    for name, tensor in source.weights.tensors():
        missing.discard(name)
        worst = max(worst, _error(name, state[name].float().cpu(), tensor, blocks[name]))
    if missing:
        raise _differs(f"{sorted(missing)[0]} is missing")
    back = source.read_tokenizer()
    if back is None:
        raise _differs("the tokenizer is missing")
    require_same_tokenizer(tokenizer, back, _differs)
    return worst


def _error(name: str, expected: Tensor, found: Tensor, stored: str) -> float:
    if expected.shape != found.shape:
        raise _differs(f"{name} is {tuple(found.shape)}, expected {tuple(expected.shape)}")
    largest = float(expected.abs().max())
    error = float((found - expected).abs().max())
    allowed = LARGEST_ERROR[stored] * largest + (0.0 if stored == "f32" else SCALE_UNDERFLOW)
    if not torch.isfinite(found).all() or not error <= allowed:
        raise _differs(f"{name} is off by {error:.3g} where {stored} allows {allowed:.3g}")
    return error / largest if largest else 0.0


def _differs(what: str) -> SmolError:
    return SmolError(f"the GGUF does not read back as the model: {what}", "Nothing was written; report this.")
