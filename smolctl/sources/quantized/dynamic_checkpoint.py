"""`NAME_quantized.ckpt`: the state of a network after `quantize_dynamic`, as torch.save wrote it.

Its keys are PyTorch's own: `….q_proj._packed_params._packed_params` is a pair of a quantized tensor and a
bias. The tied head is stored once, as `lm_head`. PyTorch's own layers can load it too: they round
activations to 7 bits, which every CPU adds up exactly, with one scale for all tokens, whatever the file asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolctl.config.load import resolve_model_config
from smolctl.errors import InputError
from smolctl.sources.base import ModelSource, SourceKind, StateWeights, TensorHeader, TokenizerFiles
from smolctl.sources.shapes import check_tensors, tensor_name

if TYPE_CHECKING:
    import torch

    from smolctl.sources.quantized.scaled import ScaledMatrix

PACKED = "._packed_params._packed_params"
BESIDE = ("._packed_params.dtype", ".scale", ".zero_point")  # says nothing that the packed matrix does not
REMEDY = "Run `smolctl quantize --to int8-dynamic` again."


def is_dynamic_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's content was written by `quantize --to int8-dynamic`."""
    return isinstance(content.get("quantization"), Mapping)


def open_dynamic_checkpoint(content: Mapping[str, Any], path: Path, name: str) -> ModelSource:
    """Open the content of a `_quantized.ckpt`.

    Raises:
        InputError: it is damaged, or its tensors do not fit its config.
    """
    values, state = content.get("config"), content.get("state_dict")
    if not isinstance(values, Mapping) or not isinstance(state, Mapping):
        raise InputError(f"{path}: has no config or no state_dict", REMEDY)
    config = resolve_model_config(dict(values), str(path))
    named = {
        tensor_name(key.removesuffix(".weight"), config): value
        for key, value in unpacked(state, path).items()
    }
    tensors = tuple(header_of(key, value) for key, value in named.items())
    mismatches = check_tensors(config, tensors)
    if mismatches:
        raise InputError(f"{path}: the tensors do not fit the config: {mismatches[0]}", REMEDY)
    return ModelSource(
        kind=SourceKind.QUANTIZED,
        id=name,
        config=config,
        declared=dict(values),
        tensors=tensors,
        weights=StateWeights(named),
        quantization=dict(content["quantization"]),
        tokenizer_reader=tokenizer_inside(content, path),
    )


def unpacked(state: Mapping[str, Any], origin: Path | str) -> dict[str, Any]:
    """A state in which what `quantize_dynamic` has packed is a `ScaledMatrix` under the layer's name.

    Raises:
        InputError: a packed matrix is not what `quantize_dynamic` makes.
    """
    import torch

    from smolctl.sources.quantized.scaled import ScaledMatrix

    found = dict(state)
    for key, value in state.items():
        if not str(key).endswith(PACKED):
            continue
        layer = key.removesuffix(PACKED)
        matrix = value[0] if isinstance(value, tuple) and value else None
        if not isinstance(matrix, torch.Tensor) or not matrix.is_quantized or matrix.dim() != 2:
            raise InputError(f"{origin}: {key} is no quantized matrix", REMEDY)
        for ending in (PACKED, *BESIDE):
            found.pop(layer + ending, None)
        found[f"{layer}.weight"] = ScaledMatrix.of(matrix)
    return found


def header_of(name: str, value: torch.Tensor | ScaledMatrix) -> TensorHeader:
    """The header of a tensor in memory, with safetensors' short names of the float types."""
    import torch

    if not isinstance(value, torch.Tensor):
        return TensorHeader(name, value.shape, "int8", value.bytes)
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorHeader(name, tuple(value.shape), names.get(dtype, dtype), value.nbytes)


def tokenizer_inside(content: Mapping[str, Any], path: Path) -> Callable[[], TokenizerFiles] | None:
    """Reads the tokenizer that a checkpoint carries; None where it carries none."""
    values = content.get("tokenizer")
    if not isinstance(values, Mapping):
        return None

    def read() -> TokenizerFiles:
        try:
            return TokenizerFiles(**values)
        except TypeError:
            raise InputError(f"{path}: the tokenizer in it is damaged", REMEDY) from None

    return read
