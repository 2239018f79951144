"""The tensors of a header: parameters in the shapes of the network, or other tensors.

Quantized files store several weights in one number, with scales in other tensors; old files contain buffers,
which are computed from the config. They must not be counted as parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from smolctl.errors import InputError
from smolctl.sources.base import TensorHeader

# Computed from the config, or collected in training without a gradient: positions, masks, wavelengths, the
# load balancing of experts (DeepSeek-V3's name and llama.cpp's), batch statistics.
BUFFER = re.compile(
    r"(.*\.)?(position_ids|token_type_ids|masked_bias|causal_mask|(original_)?inv_freq|(cos|sin)_cached"
    r"|rope[_.]freqs(\.weight)?|rope_factors_(long|short)(\.weight)?|relative_position_index|num_batches_tracked"
    r"|running_(mean|var)|final_logits_bias|e_score_correction_bias|exp_probs_b(\.bias)?)"
)
# Suffixes to the name of a module or its packed tensor, for tensors that are needed to unpack it.
BESIDE = re.compile(
    r"\.(scales?|biases|qzeros|g_idx|SCB|weight_format|(in|out)put_scale(_ub)?|input_global_scale|activation_scale)"
    r"|[._]{0,2}(global_)?scales?(_inv|_2|_and_zero)?|_zero_point|_g_idx|_shape|_global_scale"
    r"|\.(nested_)?(absmax|quant_map)|\.quant_state\..+"
)
KV_SCALE = re.compile(r".*\.(k|v|q|kv|prob)_scale")
# Bits per number of the integer types of safetensors and PyTorch.
INTEGERS = {
    **{"U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "BOOL": 8},
    **{"uint8": 8, "int8": 8, "int16": 16, "int32": 32, "int64": 64, "bool": 8},
}
BYTES, WORDS = ("U8", "uint8"), ("U32", "I32", "int32")
# Sizes of small floats, which store one weight each but have scales.
NARROW_FLOATS = ("F8", "float8")
CORRECT = "Correct the quantization section of config.json, or download the model again."
PACKED = ("qweight", "weight_packed", "weight_qdata", "weight._data", "weight")


@dataclass(frozen=True)
class SortedTensors:
    """The tensors of a file by kind."""

    parameters: tuple[TensorHeader, ...]  # in the network's shapes; `bytes` is their size in the file
    scales: tuple[TensorHeader, ...] = ()  # scales, offsets and orders of quantized weights
    buffers: tuple[TensorHeader, ...] = ()
    unknown: tuple[TensorHeader, ...] = ()  # packed in an unknown way, with an unknown number of weights


def sort_tensors(tensors: Iterable[TensorHeader], declared: Mapping[str, Any], origin: str) -> SortedTensors:
    """Separate parameters from other tensors, and give packed ones the shapes of their weights.

    Args:
        tensors: of a header.
        declared: the config.json, whose description of the quantization is used; may be empty.
        origin: name of the model in an error.

    Raises:
        InputError: the bits and groups in the config do not match the tensors.
    """
    left = {tensor.name: tensor for tensor in tensors}
    buffers = {name: tensor for name, tensor in left.items() if _is_buffer(tensor)}
    left = {name: tensor for name, tensor in left.items() if name not in buffers}
    packed: dict[str, TensorHeader] = {}
    scales: dict[str, TensorHeader] = {}
    unknown: dict[str, TensorHeader] = {}
    modules = _by_module(left)
    for name, tensor in left.items():
        if not _may_be_packed(tensor):
            continue
        module, weight = _split(name)
        beside = {
            rest: left[other]
            for other in modules.get(module, ())
            if other != name and (rest := _beside(other, name, module))
        }
        try:
            shape = _shape(tensor, beside, module, declared)
        except ValueError as error:
            raise InputError(f"{origin}: {name}: {error}", CORRECT) from None
        if shape is None:
            if name not in scales:
                unknown[name] = tensor
            continue
        scales |= {other.name: other for other in beside.values()}
        packed[name] = replace(tensor, name=weight, shape=shape)
    for name, tensor in left.items():
        if KV_SCALE.fullmatch(name) and tensor.parameters == 1:
            scales[name] = tensor
    unknown = {name: tensor for name, tensor in unknown.items() if name not in scales}
    aside = scales.keys() | unknown.keys()
    parameters = tuple(packed.get(name, tensor) for name, tensor in left.items() if name not in aside)
    return SortedTensors(parameters, tuple(scales.values()), tuple(buffers.values()), tuple(unknown.values()))


def _is_buffer(tensor: TensorHeader) -> bool:
    is_mask = tensor.name.endswith(".bias") and len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1)
    return is_mask or tensor.dtype in ("BOOL", "bool") or BUFFER.fullmatch(tensor.name) is not None


def _may_be_packed(tensor: TensorHeader) -> bool:
    """Whether a tensor may be packed: integers, or floats that are so small that they need scales."""
    return tensor.dtype in INTEGERS or tensor.dtype.startswith(NARROW_FLOATS)


def _split(name: str) -> tuple[str, str]:
    """The module of a packed tensor, and the tensor's unpacked name."""
    for ending in PACKED:
        for joint in (".", "._"):
            if name.endswith(joint + ending):
                module = name.removesuffix(joint + ending)
                return module, f"{module}.weight"
    module = name.removesuffix("_blocks")
    return module, module


def _by_module(tensors: Mapping[str, TensorHeader]) -> dict[str, list[str]]:
    """All names by the modules to which they may belong: all their prefixes."""
    found: dict[str, list[str]] = {}
    for name in tensors:
        stems = {name[: match.start()] for match in re.finditer(r"[._]", name)}
        for stem in stems:
            found.setdefault(stem, []).append(name)
    return found


def _beside(other: str, name: str, module: str) -> str:
    """The suffix of `other` for a packed tensor, such as `.scales` or `_zero_point`; "" if it does not
    belong to it.
    """
    for stem in (name, f"{module}.weight", f"{module}._weight", module):
        rest = other.removeprefix(stem)
        if rest != other and BESIDE.fullmatch(rest):
            return rest
    return ""


def _shape(
    tensor: TensorHeader, beside: Mapping[str, TensorHeader], module: str, declared: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """The shape of the weights in a tensor; None if unknown."""
    name, shape, size = tensor.name, tensor.shape, INTEGERS.get(tensor.dtype, 0)
    if not size:
        return shape  # small floats, one per weight
    scales = beside.get(".scales")
    if name.endswith(".qweight"):
        return _gptq_or_awq(shape, scales, beside.get(".qzeros"), _bits(declared, module))
    if name.endswith(".weight_packed"):
        bits = 4 if "_global_scale" in beside else _bits(declared, module)
        return _in_groups(tensor, _wider(shape, size, bits), beside.get("_scale"), declared, module)
    if name.endswith("weight_qdata"):  # torchao's: 8 bits unpacked, 4 bits in pairs
        if size == 8 and tensor.dtype not in BYTES:
            return shape
        return _wider(shape, size, 4) if tensor.dtype in BYTES and len(shape) == 2 else None
    if name.endswith("_blocks") and tensor.dtype in BYTES and len(shape) >= 2:  # OpenAI's MXFP4
        return (*shape[:-2], shape[-2] * shape[-1] * 2)
    if tensor.dtype in WORDS:
        found = _wider(shape, size, _bits(declared, module)) if scales is not None else None  # MLX
        return _in_groups(tensor, found, scales, declared, module)
    if tensor.dtype in BYTES:
        return _bytes(shape, beside, declared)
    return shape if size == 8 else None  # one integer per weight


def _bytes(
    shape: tuple[int, ...], beside: Mapping[str, TensorHeader], declared: Mapping[str, Any]
) -> tuple[int, ...] | None:
    if ".absmax" in beside:  # bitsandbytes: a flat list of pairs
        return (2 * math.prod(shape),)
    scale = beside.get("_scale")
    if scale is not None and scale.dtype.startswith(NARROW_FLOATS):  # NVFP4: one scale per 16 weights
        return _wider(shape, 8, 4)
    if scale is not None and _quantization(declared).get("quant_method") == "bitnet" and len(shape) == 2:
        return 4 * shape[0], shape[1]
    return None


def _gptq_or_awq(
    shape: tuple[int, ...], scales: TensorHeader | None, zeros: TensorHeader | None, bits: int | None
) -> tuple[int, ...] | None:
    """(out, in) of a packed (in, out): GPTQ packs along the inputs, AWQ along the outputs."""
    if scales is None or len(scales.shape) != 2 or len(shape) != 2:
        return None
    outputs = scales.shape[1]
    if zeros is not None and outputs:
        bits = 32 * zeros.shape[-1] // outputs
    if not bits:
        return None
    if shape[1] == outputs:
        found = outputs, 32 * shape[0] // bits
    elif 32 * shape[1] == bits * outputs:
        found = outputs, shape[0]
    else:
        return None
    return found if scales.shape[0] and found[1] % scales.shape[0] == 0 else None


def _wider(shape: tuple[int, ...], size: int, bits: int | None) -> tuple[int, ...] | None:
    """A shape with its last dimension unpacked from numbers of `size` bits."""
    if not bits or not shape or shape[-1] * size % bits:
        return None
    return (*shape[:-1], shape[-1] * size // bits)


def _in_groups(
    packed: TensorHeader,
    shape: tuple[int, ...] | None,
    scales: TensorHeader | None,
    declared: Mapping[str, Any],
    module: str,
) -> tuple[int, ...] | None:
    """The shape of the weights of a tensor with a scale for each group of a row.

    Raises:
        ValueError: the number of scales does not match.
    """
    if shape is None or scales is None or len(scales.shape) != len(shape):
        return shape
    columns, groups = shape[-1], scales.shape[-1]
    size = _stated(declared, module, "group_size")
    if groups == (-(-columns // size) if size else math.gcd(columns, groups)):
        return shape
    stated = f"{_bits(declared, module) or 4} bits per weight{f' in groups of {size}' if size else ''}"
    raise ValueError(
        f"{stated}, as the config states, do not fit the shape {list(packed.shape)} and the scales' "
        f"{list(scales.shape)}"
    )


def _quantization(declared: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config's description of its quantization: MLX uses `quantization`, the others
    `quantization_config`.
    """
    for key in ("quantization", "quantization_config", "compression_config"):
        if isinstance(found := declared.get(key), Mapping):
            return found
    return {}


def _bits(declared: Mapping[str, Any], module: str) -> int | None:
    """Bits per weight of a module; None if the config has none, or several."""
    bits = _stated(declared, module, "bits", "w_bit", "num_bits")
    return bits if bits is not None and bits <= 32 else None


def _stated(declared: Mapping[str, Any], module: str, *names: str) -> int | None:
    """A positive number in a config for the quantization of a module under one of these names; None if
    there is none, or several.
    """
    found = _quantization(declared)
    own = found.get(module)
    described: list[Any] = [own if isinstance(own, Mapping) else found]
    groups = described[0].get("config_groups")
    if isinstance(groups, Mapping):
        described += [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
    listed = [one.get(name) for one in described if isinstance(one, Mapping) for name in names]
    numbers = {value for value in listed if type(value) is int and value > 0}
    return numbers.pop() if len(numbers) == 1 else None
