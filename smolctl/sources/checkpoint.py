"""PyTorch's .ckpt files as a MODEL: Lightning's, a plain state dict, and either after `quantize_dynamic`.

Code in their pickle is never executed: `weights_only=True` always. After `quantize_dynamic` the keys are
PyTorch's own: `….q_proj._packed_params._packed_params` is a pair of a quantized tensor and a bias. `quantize`
writes such a state as `NAME_quantized.ckpt`, with a tied head stored once, as `lm_head`. PyTorch's own layers
can load it too, but they always quantize activations to 7 bits, for which every CPU computes exact sums, with
one scale for all tokens, whatever the file specifies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolctl.config import ModelConfig
from smolctl.config.load import resolve_model_config
from smolctl.errors import InputError
from smolctl.outside import checked
from smolctl.runs.checkpoint_file import ANOTHER, holds_weights, read_checkpoint, recorded_config
from smolctl.runs.folder import RunFolder
from smolctl.sources.base import (
    ModelSource,
    RecordedLoss,
    SourceKind,
    StateWeights,
    TensorHeader,
    TokenizerFiles,
)
from smolctl.sources.huggingface.folder import describe_beside
from smolctl.sources.huggingface.tokenizer import tokenizer_reader
from smolctl.sources.provenance import reference_of
from smolctl.sources.quantized_folder import DYNAMIC, Made
from smolctl.sources.shapes import check_tensors, with_table

if TYPE_CHECKING:
    import torch

    from smolctl.sources.quantized.scaled import ScaledMatrix

ZIP_MAGIC = b"PK\x03\x04"  # of a zip archive, which torch.save writes
# Prefixes that torch.compile, DDP and FSDP add to the names of the modules they wrap.
WRAPPERS = {"_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module"}
# Keys under which trainers store the weights: Lightning, nanoGPT and litgpt, DeepSpeed, and many scripts.
HOLDERS = ("state_dict", "model", "module", "model_state_dict", "model_state")
PACKED = "._packed_params._packed_params"
BESIDE = ("._packed_params.dtype", ".scale", ".zero_point")  # redundant with the packed matrix
REMEDY = "Run `smolctl quantize --to int8-dynamic` again."


def open_checkpoint(path: Path, name: str) -> ModelSource:
    """Read a checkpoint's description; its tensors stay on the disk.

    Raises:
        InputError: the file is damaged, contains code, or has no weights.
    """
    import torch

    content = read_checkpoint(path)
    run = recorded_config(content, path)
    if run is not None and run.init_from is not None and not holds_weights(content):
        return ModelSource(
            SourceKind.CHECKPOINT,
            name,
            run.model,
            declared=run.model.model_dump(mode="json"),
            run=run,
            step=0,
            problems=(f"the weights of step 0 are those of {reference_of(run.init_from)}",),
            tokenizer_reader=_tokenizer_of(content, path),
        )
    model = run.model if run else _model_of_quantized(content, path)
    state, reader = network_state(content, path), _tokenizer_of(content, path)
    if model is None:
        source = describe_beside(
            SourceKind.CHECKPOINT, name, path.parent, _headers(state), (), StateWeights(state), reader
        )
    else:
        state = with_table(state, model.tie_word_embeddings)
        source = ModelSource(
            SourceKind.CHECKPOINT,
            name,
            model,
            declared=model.model_dump(mode="json"),
            tensors=_headers(state),
            run=run,
            weights=StateWeights(state),
            tokenizer_reader=reader,
        )
        source = replace(source, problems=check_tensors(model, source.tensors or ()))
    quantization = content["quantization"] if model and not run else None
    if quantization is None and not all(isinstance(value, torch.Tensor) for value in state.values()):
        quantization = {"scheme": DYNAMIC}
    step = content.get("global_step")
    return replace(
        source,
        kind=SourceKind.QUANTIZED if quantization else SourceKind.CHECKPOINT,
        step=step if type(step) is int else None,
        recorded_loss=_recorded_loss(content, path),
        quantization=quantization,
    )


def _headers(state: Mapping[str, torch.Tensor | ScaledMatrix]) -> tuple[TensorHeader, ...]:
    """The header of every tensor, with ties between those that share their data."""
    import torch

    seen: dict[object, str] = {}
    headers = []
    for name, value in state.items():
        shares = ""
        if isinstance(value, torch.Tensor) and value.numel():
            place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            shares = seen.setdefault(place, name)
        headers.append(replace(_header_of(name, value), shares="" if shares == name else shares))
    return tuple(headers)


def _model_of_quantized(content: Mapping[str, Any], path: Path) -> ModelConfig | None:
    """The config of a checkpoint that `quantize` wrote; None in other checkpoints."""
    if not isinstance(content.get("quantization"), Mapping):
        return None
    values = content.get("config")
    if not isinstance(values, Mapping):
        raise InputError(f"{path}: has no config", REMEDY)
    made = checked(Made, content["quantization"], f"{path}: quantization", REMEDY)
    if made["scheme"] != DYNAMIC:
        raise InputError(f"{path}: quantization: scheme: no checkpoint holds {made['scheme']}", REMEDY)
    return resolve_model_config(values, str(path))


def network_state(content: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor | ScaledMatrix]:
    """The network's tensors under their Hugging Face names, some of them packed by `quantize_dynamic`.

    Raises:
        InputError: there are none, or two tensors have the same name without the wrappers' prefixes.
    """
    import torch

    from smolctl.sources.quantized.scaled import ScaledMatrix

    kinds = (torch.Tensor, ScaledMatrix)
    content = _unpacked(content, path)
    bare = all(isinstance(value, kinds) for value in content.values())  # torch.save(state_dict)
    held = (content[key] for key in HOLDERS if isinstance(content.get(key), Mapping))
    state = content if bare else next(held, None)
    if not isinstance(state, Mapping):
        keys = ", ".join(map(str, list(content)[:5]))
        raise InputError(
            f"{path}: has no state_dict; it holds {keys}",
            "Name a checkpoint that a training run has written, or save only the weights: "
            "torch.save(model.state_dict(), FILE).",
        )
    tensors: dict[str, torch.Tensor | ScaledMatrix] = {}
    for key, value in _unpacked(state, path).items():
        if not isinstance(value, kinds):
            continue
        name = clean_name(str(key))
        if name in tensors:
            raise InputError(f"{path}: contains {name} twice", "Name a checkpoint of one network.")
        if isinstance(value, torch.Tensor) and not _is_plain(value):
            raise InputError(f"{path}: {name} is not a tensor with its data in the file", ANOTHER)
        tensors[name] = value
    if not tensors:
        raise InputError(
            f"{path}: its state_dict contains no tensors", "Name a checkpoint that a run has written."
        )
    return tensors


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has ordinary storage: not sparse, not without data, not one number repeated."""
    import torch

    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_complex():
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _unpacked(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A state in which every matrix packed by `quantize_dynamic` is a `ScaledMatrix` under the layer's name.

    Raises:
        InputError: a packed matrix is not one of `quantize_dynamic`.
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
            raise InputError(f"{path}: {key} is not a quantized matrix", REMEDY)
        for ending in (PACKED, *BESIDE):
            found.pop(layer + ending, None)
        found[f"{layer}.weight"] = ScaledMatrix.of(matrix)
        if isinstance(value[-1], torch.Tensor) and len(value) == 2:
            found[f"{layer}.bias"] = value[1]
    return found


def clean_name(name: str) -> str:
    """`network._orig_mod.model.norm.weight` -> `model.norm.weight`."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "network":
        parts = parts[1:]
    return ".".join(parts)


def _header_of(name: str, value: torch.Tensor | ScaledMatrix) -> TensorHeader:
    """The header of a tensor in memory, with safetensors' short names of the float types."""
    import torch

    if not isinstance(value, torch.Tensor):
        return TensorHeader(name, value.shape, "int8", value.bytes)
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorHeader(name, tuple(value.shape), names.get(dtype, dtype), value.nbytes)


def _tokenizer_of(content: Mapping[str, Any], path: Path) -> Callable[[], TokenizerFiles | None] | None:
    """The tokenizer of the checkpoint's run, else the one inside it, else the one next to it."""
    run = RunFolder.around(path)
    of_run = tokenizer_reader(run.tokenizer, carry=False) if run else None
    return of_run or tokenizer_inside(content, path) or tokenizer_reader(path.parent)


def tokenizer_inside(content: Mapping[str, Any], path: Path) -> Callable[[], TokenizerFiles] | None:
    """A reader for the tokenizer inside a checkpoint; None if there is none."""
    inside = content.get("tokenizer")
    if not isinstance(inside, Mapping):
        return None

    return lambda: checked(TokenizerFiles, inside, f"{path}: the tokenizer in it is damaged", ANOTHER)


def _recorded_loss(content: Mapping[str, Any], path: Path) -> RecordedLoss | None:
    """The loss that the run recorded when it wrote the checkpoint.

    Raises:
        InputError: it is damaged.
    """
    import torch

    state = content.get("smolctl")
    held_out = state.get("held_out") if isinstance(state, Mapping) else None
    if not isinstance(held_out, Mapping) or not {"loss", "tokens"} <= held_out.keys():
        return None
    tokens, loss, end = held_out["tokens"], held_out["loss"], held_out.get("document_end")
    is_table = isinstance(tokens, torch.Tensor) and _is_plain(tokens) and tokens.dim() == 2
    if not is_table or not isinstance(loss, float) or type(end) not in (int, type(None)):
        raise InputError(f"{path}: the loss that it records is damaged", ANOTHER)
    return RecordedLoss(tokens, loss, end)
