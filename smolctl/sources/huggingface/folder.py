"""A Hugging Face folder, its config.json, or a lone .safetensors file as a MODEL."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolctl.config import ModelConfig
from smolctl.errors import InputError
from smolctl.outside import read_file, read_json
from smolctl.sources.base import ModelSource, SourceKind, TensorHeader, TokenizerFiles, Weights
from smolctl.sources.huggingface.card import card_beside
from smolctl.sources.huggingface.config import assumed_keys, counted_config, from_huggingface_config
from smolctl.sources.huggingface.safetensors_file import (
    SafetensorsWeights,
    read_header,
    read_shards,
    read_weight_map,
)
from smolctl.sources.huggingface.tokenizer import TOKENIZER_FILES, tokenizer_reader
from smolctl.sources.meta import MetaWeights, from_params, huggingface_name, is_meta, is_params
from smolctl.sources.names import ADAPTER, RenamedWeights, format_of, huggingface_names
from smolctl.sources.shapes import check_tensors, recover_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PARTS = frozenset((*TOKENIZER_FILES, INDEX, "params.json"))
LONE_ENDINGS = (".gguf", ".bin", ".pth", ".pt", ".ckpt")
MERGE = "Merge it into its base model with peft (merge_and_unload, save_pretrained) and name the result."
KIND = "Name the config.json of a model, its folder or its weights."
CONFIG_KEYS = frozenset(("architectures", "hidden_size", "model_type", "text_config", "vocab_size"))
BOTH = f"{SINGLE} and {INDEX} are both there: {SINGLE} is read, as transformers does"


def is_huggingface_folder(folder: Path) -> bool:
    """Whether a folder contains a config.json, Meta's params.json or safetensors."""
    named = any((folder / name).is_file() for name in ("config.json", "params.json"))
    return named or any(folder.glob("*.safetensors"))


def require_parts(folder: Path) -> None:
    """Refuse a folder in which a part of the model cannot be read, because another model might be read
    without it.

    Raises:
        InputError: one of its files is a broken link, a folder, a pipe or a device.
    """
    for path in sorted(folder.iterdir()):
        is_part = path.name in PARTS or path.name.endswith((".safetensors", *LONE_ENDINGS))
        if not is_part or path.is_file():
            continue
        if not path.exists():
            raise broken_link(path)
        if not path.is_dir() or path.name in PARTS or path.suffix == ".safetensors":
            raise InputError(f"{path}: not a file", "Put the file of this name there.")


def broken_link(path: Path) -> InputError:
    """The message about a broken link."""
    return InputError(f"{path}: a link to {path.readlink()}, which is not there", "Restore its target.")


def files_of_model(folder: Path) -> tuple[str, ...]:
    """Names of a model's files in a folder: configs, tokenizer and weights."""
    weights = (path.name for path in sorted(folder.glob("*.safetensors*")))
    return (*(name for name in TOKENIZER_FILES if os.path.lexists(folder / name)), *weights)


def open_folder(folder: Path, name: str, kind: SourceKind = SourceKind.FOLDER) -> ModelSource:
    """Open a folder saved by transformers.

    Raises:
        InputError: a file is damaged or missing.
    """
    weights, tensors, problems = _folder_weights(folder)
    source = describe_beside(kind, name, folder, tensors, problems, weights, tokenizer_reader(folder))
    missing = problems[0] if weights is None and problems else ""
    return dataclasses.replace(_with_adapter(source, folder), card=card_beside(folder), missing_parts=missing)


def _with_adapter(source: ModelSource, folder: Path) -> ModelSource:
    """If an adapter's config is in the folder, add the name of its base model to the reason."""
    path = folder / "adapter_config.json"
    is_adapter = source.unsupported == ADAPTER or not source.declared
    if source.config is not None or not is_adapter or not path.is_file():
        return source
    return dataclasses.replace(source, unsupported=f"{_adapter(read_json(path))}. {MERGE}".rstrip("."))


def open_config_json(path: Path, name: str) -> ModelSource:
    """Open a config.json, with the weights next to it."""
    if path.name == "config.json":
        return open_folder(path.parent, name)
    content = read_json(path)
    if is_params(content):
        declared, assumed, unsupported = from_params(content, {}, name)
        kind = SourceKind.FOLDER
        return describe(kind, name, declared, None, assumptions=assumed, unsupported=unsupported)
    require_config_json(content, name)
    return describe(SourceKind.FOLDER, name, content, None)


def require_config_json(content: Mapping[str, Any], origin: str) -> None:
    """Refuse the other JSON files of a model.

    Raises:
        InputError: it is an index, a tokenizer or an adapter's config, or has no key of a config.json.
    """
    if "weight_map" in content:
        raise InputError(f"{origin}: an index of weights", "Name the folder that contains it.")
    if "peft_type" in content:
        raise InputError(f"{origin}: {_adapter(content)}", MERGE)
    if isinstance(content.get("model"), dict) and {"added_tokens", "pre_tokenizer"} & content.keys():
        raise InputError(
            f"{origin}: a tokenizer", "Name the folder or the weights; `sample` has --tokenizer."
        )
    if not CONFIG_KEYS & content.keys():
        raise InputError(f"{origin}: no config.json: it has no {', '.join(sorted(CONFIG_KEYS))}", KIND)


def _adapter(content: Mapping[str, Any]) -> str:
    """What an adapter_config.json says about the weights next to it."""
    base, rank = content.get("base_model_name_or_path"), content.get("r")
    return f"a {content.get('peft_type')} adapter of rank {rank} for {base}, which holds no model of its own"


def open_safetensors(path: Path, name: str) -> ModelSource:
    """Open one file; its config is the config.json next to it, or is recovered from the shapes."""
    tensors, weights, beside = read_header(path), SafetensorsWeights({path: None}), path.parent
    kind, reader = SourceKind.SAFETENSORS, tokenizer_reader(beside)
    source = describe_beside(kind, name, beside, tensors, weights=weights, reader=reader)
    return dataclasses.replace(_with_adapter(source, beside), card=card_beside(beside))


def describe_beside(
    kind: SourceKind,
    name: str,
    folder: Path,
    tensors: tuple[TensorHeader, ...] | None,
    problems: tuple[str, ...] = (),
    weights: Weights | None = None,
    reader: Callable[[], TokenizerFiles | None] | None = None,
) -> ModelSource:
    """A source from the header and from the config.json, or Meta's params.json, in the same folder.

    Raises:
        InputError: the config is damaged.
    """
    require_parts(folder)
    declared, assumed, unsupported = _declared_in(folder, tensors or ())
    return describe(kind, name, declared, tensors, problems, weights, reader, assumed, unsupported)


def _declared_in(
    folder: Path, tensors: tuple[TensorHeader, ...]
) -> tuple[dict[str, Any] | None, tuple[str, ...], str]:
    """What a folder declares about its model, the assumed values, and the unsupported feature."""
    config, params = folder / "config.json", folder / "params.json"
    if config.is_file():
        return read_json(config), (), ""
    values = read_json(params) if params.is_file() else {}
    if not is_params(values):
        return None, (), ""
    shapes = {huggingface_name(one.name): one.shape for one in tensors}
    return from_params(values, shapes, str(params))


@dataclass(frozen=True)
class _Network:
    """A network from its config.json or its shapes; fields as in `ModelSource`."""

    config: ModelConfig | None = None
    shape: ModelConfig | None = None
    unsupported: str = ""
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _declared(
    declared: Mapping[str, Any],
    name: str,
    renamed: tuple[TensorHeader, ...],
    tensors: tuple[TensorHeader, ...],
    assumptions: tuple[str, ...],
) -> _Network:
    """The network of a config.json, if the tensors belong to it."""
    config, unsupported = from_huggingface_config(declared, name)
    shape = None if config else counted_config(declared, name)
    unfit = check_tensors(config, renamed) if config and tensors else ()
    if unfit and (known := format_of(tensor.name for tensor in tensors)):
        config, unsupported, unfit = None, known, ()
    assumed = assumed_keys(declared) if config or shape else ()
    return _Network(config, shape, unsupported, assumptions, (*assumed, *unfit))


def _recovered(renamed: tuple[TensorHeader, ...], tensors: tuple[TensorHeader, ...]) -> _Network:
    """The network with tensors of these shapes, without a config.json."""
    config, unsupported, assumptions = recover_config(renamed)
    if config is None and (known := format_of(tensor.name for tensor in tensors)):
        unsupported = known
    return _Network(config, unsupported=unsupported, assumptions=assumptions)


def describe(
    kind: SourceKind,
    name: str,
    declared: Mapping[str, Any] | None,
    tensors: tuple[TensorHeader, ...] | None,
    problems: tuple[str, ...] = (),
    weights: Weights | None = None,
    reader: Callable[[], TokenizerFiles | None] | None = None,
    assumptions: tuple[str, ...] = (),
    unsupported: str = "",
) -> ModelSource:
    """A source from the header and from config.json's content (None: recovered from shapes).

    Args:
        assumptions: values of the config that are in no file.
        unsupported: the reason why smolctl's network cannot represent it, if already known.
    """
    tied = declared is None or bool(declared.get("tie_word_embeddings"))
    names = huggingface_names((tensor.name for tensor in tensors or ()), tied)
    renamed = tuple(dataclasses.replace(tensor, name=names[tensor.name]) for tensor in tensors or ())
    if declared is not None and not unsupported:
        network = _declared(declared, name, renamed, tensors or (), assumptions)
    elif declared is None and tensors is not None:
        network = _recovered(renamed, tensors)
    else:
        nothing = "there is no config.json and there are no weights"
        reason = nothing if declared is None else unsupported
        network = _Network(unsupported=reason, assumptions=assumptions)
    config = network.config
    if config is not None and tensors is not None and any(old != new for old, new in names.items()):
        tensors, weights = renamed, RenamedWeights(weights, names) if weights else None
        if weights is not None and is_meta(names):
            weights = MetaWeights(weights, config)
    return ModelSource(
        kind=kind,
        id=name,
        config=config,
        unsupported=network.unsupported,
        shape=network.shape,
        declared=declared or {},
        recovered_from_shapes=declared is None,
        tensors=tensors,
        problems=problems + network.assumptions + network.notes,
        assumptions=network.assumptions,
        weights=weights,
        tokenizer_reader=reader,
    )


def _folder_weights(
    folder: Path,
) -> tuple[SafetensorsWeights | None, tuple[TensorHeader, ...] | None, tuple[str, ...]]:
    both = (folder / INDEX).is_file() and (folder / SINGLE).is_file()
    if (folder / INDEX).is_file() and not both:
        named = read_weight_map(read_file(folder / INDEX), str(folder / INDEX))
        if not any((folder / name).exists() for name in named):
            return None, None, (f"none of the {len(named)} files that {INDEX} names is here",)
        shards, tensors = read_shards(folder, folder / INDEX)
        return SafetensorsWeights(shards), tensors, ()
    files = sorted(folder.glob("*.safetensors"))
    if (folder / SINGLE) in files:
        files = [folder / SINGLE]
    if len(files) > 1:
        raise InputError(
            f"{folder}: {len(files)} safetensors files and no {INDEX}",
            "Name one of the files, or add the index.",
        )
    if files:
        notes = (BOTH,) if both and not _names_only(folder / INDEX, SINGLE) else ()
        return SafetensorsWeights({files[0]: None}), read_header(files[0]), notes
    others = sorted(path.name for pattern in ("*.bin", "*.gguf", "*.pth") for path in folder.glob(pattern))
    notes = (f"no safetensors here; name the file to read {', '.join(others)}",) if others else ()
    return None, None, notes


def _names_only(index: Path, name: str) -> bool:
    """Whether an index refers only to this file."""
    return set(read_weight_map(read_file(index), str(index))) == {name}
