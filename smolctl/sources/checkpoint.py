"""Lightning's .ckpt files as a MODEL. Their pickle is never executed: `weights_only=True` always."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolctl.errors import InputError
from smolctl.runs.checkpoint_file import read_checkpoint, recorded_config
from smolctl.runs.folder import RunFolder
from smolctl.sources.base import ModelSource, RecordedLoss, SourceKind, StateWeights, TokenizerFiles
from smolctl.sources.huggingface.tokenizer import tokenizer_reader
from smolctl.sources.quantized.dynamic_checkpoint import (
    header_of,
    is_dynamic_checkpoint,
    open_dynamic_checkpoint,
    tokenizer_inside,
    unpacked,
)
from smolctl.sources.shapes import check_tensors, recover_config

if TYPE_CHECKING:
    import torch

    from smolctl.sources.quantized.scaled import ScaledMatrix

ZIP_MAGIC = b"PK\x03\x04"  # of a zip, which is what torch.save writes
# What torch.compile, DDP and FSDP put before the names of the modules they wrap.
WRAPPERS = {"_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module"}


def open_checkpoint(path: Path, name: str) -> ModelSource:
    """Read what a checkpoint says of itself; its tensors stay on the disk.

    Raises:
        InputError: the file is damaged, holds code, or no weights.
    """
    import torch

    content = read_checkpoint(path)
    if is_dynamic_checkpoint(content):
        return open_dynamic_checkpoint(content, path, name)
    state = network_state(content, path)
    tensors = tuple(header_of(key, value) for key, value in state.items())
    quantized = not all(isinstance(value, torch.Tensor) for value in state.values())
    step = content.get("global_step")
    run = recorded_config(content, path)
    config, unsupported, problems = (
        (run.model, "", check_tensors(run.model, tensors)) if run else recover_config(tensors)
    )
    return ModelSource(
        kind=SourceKind.QUANTIZED if quantized else SourceKind.CHECKPOINT,
        id=name,
        config=config,
        unsupported=unsupported,
        declared=run.model.model_dump(mode="json") if run else {},
        recovered_from_shapes=run is None,
        tensors=tensors,
        run=run,
        problems=problems,
        step=step if type(step) is int else None,
        weights=StateWeights(state),
        recorded_loss=_recorded_loss(content),
        quantization={"scheme": "int8-dynamic"} if quantized else None,
        tokenizer_reader=_tokenizer_of(content, path),
    )


def network_state(content: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor | ScaledMatrix]:
    """The network's tensors under their Hugging Face names, and what `quantize_dynamic` made of some.

    Raises:
        InputError: there are none, or two tensors have the same name once wrappers are taken off.
    """
    import torch

    from smolctl.sources.quantized.scaled import ScaledMatrix

    kinds = (torch.Tensor, ScaledMatrix)
    content = unpacked(content, path)
    bare = all(isinstance(value, kinds) for value in content.values())  # torch.save(state_dict)
    state = content if bare else content.get("state_dict")
    if not isinstance(state, Mapping):
        raise InputError(f"{path}: has no state_dict", "Name a checkpoint that a training run has written.")
    tensors: dict[str, torch.Tensor | ScaledMatrix] = {}
    for key, value in unpacked(state, path).items():
        if not isinstance(value, kinds):
            continue
        name = clean_name(str(key))
        if name in tensors:
            raise InputError(f"{path}: holds {name} twice", "Name a checkpoint of one network.")
        tensors[name] = value
    if not tensors:
        raise InputError(
            f"{path}: its state_dict holds no tensors", "Name a checkpoint that a run has written."
        )
    return tensors


def clean_name(name: str) -> str:
    """`network._orig_mod.model.norm.weight` as `model.norm.weight`."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "network":
        parts = parts[1:]
    return ".".join(parts)


def _tokenizer_of(content: Mapping[str, Any], path: Path) -> Callable[[], TokenizerFiles | None] | None:
    """The tokenizer of the run that a checkpoint lies in, else the one in it, else the one beside it."""
    run = RunFolder.around(path)
    of_run = tokenizer_reader(run.tokenizer) if run else None
    return of_run or tokenizer_inside(content, path) or tokenizer_reader(path.parent)


def _recorded_loss(content: Mapping[str, Any]) -> RecordedLoss | None:
    """What the run recorded when it wrote the checkpoint."""
    state = content.get("smolctl")
    held_out = state.get("held_out") if isinstance(state, Mapping) else None
    if not isinstance(held_out, Mapping) or "loss" not in held_out:
        return None
    return RecordedLoss(held_out["tokens"], held_out["loss"], held_out.get("document_end"))
