"""Lightning's .ckpt files as a MODEL. Their pickle is never executed: `weights_only=True` always."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolctl.config import RunConfig
from smolctl.config.load import resolve_run_config
from smolctl.errors import InputError
from smolctl.runs.folder import CHECKPOINTS, RunFolder, damage_of
from smolctl.sources.base import ModelSource, SourceKind, TensorHeader, TokenizerFiles, Weights
from smolctl.sources.huggingface.tokenizer import tokenizer_reader
from smolctl.sources.quantized.dynamic_checkpoint import is_dynamic_checkpoint, open_dynamic_checkpoint
from smolctl.sources.shapes import check_tensors, recover_config

if TYPE_CHECKING:
    import torch

REMEDY = "Use another checkpoint of the run: it is damaged or not complete."
# What torch.compile, DDP and FSDP put before the names of the modules they wrap.
WRAPPERS = {"_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module"}


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a zip, which is what torch.save writes."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def open_checkpoint(path: Path, name: str) -> ModelSource:
    """Read what a checkpoint says of itself; its tensors stay on the disk.

    Raises:
        InputError: the file is damaged, holds code, or no weights.
    """
    content = read_checkpoint(path)
    if is_dynamic_checkpoint(content):
        return open_dynamic_checkpoint(content, path, name)
    state = network_state(content, path)
    tensors = tuple(
        TensorHeader(key, tuple(value.shape), _dtype(value), value.numel() * value.element_size())
        for key, value in state.items()
    )
    step = content.get("global_step")
    common: dict[str, Any] = {
        "kind": SourceKind.CHECKPOINT,
        "id": name,
        "tensors": tensors,
        "step": step if type(step) is int else None,
        "weights": StateWeights(state),
        "tokenizer_reader": _tokenizer_beside(path),
    }
    run = _recipe(content, path)
    if run is None:
        recovered = recover_config(tensors)
        return ModelSource(
            **common,
            config=recovered.config,
            unsupported=recovered.unsupported,
            recovered_from_shapes=True,
            problems=recovered.assumptions,
        )
    return ModelSource(
        **common,
        config=run.model,
        run=run,
        declared=run.model.model_dump(mode="json"),
        problems=check_tensors(run.model, tensors),
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary in a checkpoint, its tensors memory-mapped.

    Raises:
        InputError: the file is truncated or damaged, no checkpoint, or holds code.
    """
    import torch

    damage = damage_of(path)
    if damage:
        raise InputError(f"{path}: {damage}", REMEDY)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's guesses about a damaged pickle
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise _load_error(path, error) from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: no checkpoint of a training run", "Name a run folder or one of its checkpoints."
        )
    return content


def _load_error(path: Path, error: Exception) -> InputError:
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        unsafe = sorted(get_unsafe_globals_in_checkpoint(str(path)))  # reads the pickle, does not run it
    except Exception:
        unsafe = []
    if unsafe and isinstance(error, pickle.UnpicklingError):
        return InputError(
            f"{path}: refused, because it holds code: {', '.join(unsafe[:3])}; nothing was executed",
            "Ask its author for safetensors, or for a checkpoint that holds tensors and plain values only.",
        )
    reason = (str(error) or type(error).__name__).strip().splitlines()[0][:120]
    return InputError(f"{path}: damaged checkpoint ({reason})", REMEDY)


def network_state(content: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The network's tensors under their Hugging Face names.

    Raises:
        InputError: there are none, or two tensors have the same name once wrappers are taken off.
    """
    import torch

    bare = all(isinstance(value, torch.Tensor) for value in content.values())  # torch.save(state_dict)
    state = content if bare else content.get("state_dict")
    if not isinstance(state, Mapping):
        raise InputError(f"{path}: has no state_dict", "Name a checkpoint that a training run has written.")
    tensors: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
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


def _recipe(content: Mapping[str, Any], path: Path) -> RunConfig | None:
    """The resolved config that smolctl keeps in a checkpoint; None in those of others."""
    parameters = content.get("hyper_parameters")
    values = parameters.get("config") if isinstance(parameters, Mapping) else None
    if not isinstance(values, Mapping) or "model" not in values:
        return None
    return resolve_run_config(values, str(path))


def _tokenizer_beside(path: Path) -> Callable[[], TokenizerFiles | None] | None:
    """The tokenizer of the run that a checkpoint lies in."""
    if path.resolve().parent.name != CHECKPOINTS:
        return None
    return tokenizer_reader(RunFolder(path.resolve().parent.parent).tokenizer)


def _dtype(tensor: torch.Tensor) -> str:
    """Safetensors' short names, so that every header speaks the same."""
    names = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float64": "F64"}
    return names.get(str(tensor.dtype), str(tensor.dtype).removeprefix("torch."))


class StateWeights(Weights):
    """Tensors that torch has mapped from a checkpoint already."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.state = state

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.state.items()
