"""`NAME_quantized.ckpt`: the state of a network after `quantize_dynamic`, as torch.save wrote it.

Its keys are PyTorch's own: `….q_proj._packed_params._packed_params` is a pair of a quantized tensor and a
bias. The tied head is stored once, as `lm_head`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolctl.config import ModelConfig
from smolctl.config.load import resolve_model_config
from smolctl.errors import InputError
from smolctl.sources.base import ModelSource, SourceKind, TensorHeader, TokenizerFiles, Weights
from smolctl.sources.shapes import HEAD, TABLE, check_tensors

if TYPE_CHECKING:
    import torch

    from smolctl.sources.quantized.scaled import ScaledMatrix

PACKED = "._packed_params._packed_params"
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
    weights = DynamicWeights(plain_state(config, state, path))
    tensors = tuple(_header(key, value) for key, value in weights.state.items())
    mismatches = check_tensors(config, tensors)
    if mismatches:
        raise InputError(f"{path}: the tensors do not fit the config: {mismatches[0]}", REMEDY)
    return ModelSource(
        kind=SourceKind.QUANTIZED,
        id=name,
        config=config,
        declared=dict(values),
        tensors=tensors,
        weights=weights,
        quantization=dict(content["quantization"]),
        tokenizer_reader=tokenizer_inside(content, path),
    )


def plain_state(
    config: ModelConfig, state: Mapping[str, Any], origin: Path | str
) -> dict[str, torch.Tensor | ScaledMatrix]:
    """PyTorch's quantized state as tensors and scaled matrices under Hugging Face names.

    Raises:
        InputError: a packed matrix is not what `quantize_dynamic` makes.
    """
    import torch

    from smolctl.sources.quantized.scaled import ScaledMatrix

    plain: dict[str, torch.Tensor | ScaledMatrix] = {}
    for key, value in state.items():
        if key.endswith(PACKED):
            matrix = value[0] if isinstance(value, tuple) and value else None
            if not isinstance(matrix, torch.Tensor) or not matrix.is_quantized or matrix.dim() != 2:
                raise InputError(f"{origin}: {key} is no quantized matrix", REMEDY)
            plain[_name(key.removesuffix(PACKED), config)] = ScaledMatrix(matrix.int_repr(), _scales(matrix))
        elif isinstance(value, torch.Tensor) and key.endswith(".weight"):
            plain[_name(key.removesuffix(".weight"), config)] = value
    return plain


def _name(module: str, config: ModelConfig) -> str:
    name = f"{module}.weight"
    return TABLE if name == HEAD and config.tie_word_embeddings else name


def _scales(matrix: torch.Tensor) -> torch.Tensor:
    import torch

    if matrix.qscheme() == torch.per_tensor_affine:
        return torch.tensor([matrix.q_scale()], dtype=torch.float32)
    return matrix.q_per_channel_scales().float()


def _header(name: str, value: torch.Tensor | ScaledMatrix) -> TensorHeader:
    import torch

    if isinstance(value, torch.Tensor):
        return TensorHeader(name, tuple(value.shape), "float32", value.numel() * value.element_size())
    return TensorHeader(name, value.shape, "int8", value.bytes)


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


class DynamicWeights(Weights):
    """The matrices of a `_quantized.ckpt`, already unpacked."""

    def __init__(self, state: Mapping[str, torch.Tensor | ScaledMatrix]) -> None:
        self.state = state

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        from smolctl.sources.quantized.scaled import ScaledMatrix

        for name, item in self.parts():
            yield name, item.dequantize() if isinstance(item, ScaledMatrix) else item

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Every tensor as it is stored: a tensor or a `ScaledMatrix`."""
        yield from self.state.items()
