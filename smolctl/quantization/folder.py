"""Writes a model as a folder: to a temporary place, read back and compared bit for bit, then renamed."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smolctl import __version__
from smolctl.config import ModelConfig, Provenance
from smolctl.durable import file_digest, lack_of_room, sync_file, sync_folder, write_json
from smolctl.errors import SmolError
from smolctl.model.dynamic import dynamic_network, dynamic_state
from smolctl.ownership import Record, building, put_in_place, write_record
from smolctl.quantization.schemes import QuantizationPlan
from smolctl.runs.checkpoint_file import FORMAT as CHECKPOINT_FORMAT
from smolctl.sources import open_source
from smolctl.sources.arrays import Array, as_tensor, name_of
from smolctl.sources.base import TokenizerFiles
from smolctl.sources.huggingface.write import write_model
from smolctl.sources.quantized.packed import PackedMatrix
from smolctl.sources.quantized.scaled import ScaledMatrix, StoredTensor
from smolctl.sources.quantized_folder import (
    DESCRIPTION,
    DYNAMIC,
    FILE,
    FORMAT,
    OFFSETS,
    SCALES,
    VALUES,
    VERSION,
    header_digest,
)

SMALL_FILES = 32 << 20  # free space for tokenizer, configs and the file system's own data
CHECKPOINT_SUFFIX = "_quantized.ckpt"
QUANTIZED_MODEL = "quantized model"


class WriteError(SmolError):
    """A quantized model could not be written; earlier files are unchanged."""


@dataclass(frozen=True)
class Origin:
    """The model that was quantized."""

    id: str
    kind: str
    revision: str | None = None
    step: int | None = None
    provenance: Provenance | None = None

    def document(self) -> dict[str, Any]:
        """The same as plain data."""
        plain = self.provenance and self.provenance.model_dump(mode="json", exclude_none=True)
        return {**vars(self), "provenance": plain}


def write_folder(
    target: Path,
    config: ModelConfig,
    plan: QuantizationPlan,
    items: Mapping[str, StoredTensor],
    tokenizer: TokenizerFiles | None,
    origin: Origin,
    name: str = "model",
) -> tuple[str, ...]:
    """Write a model as a folder that every command accepts as MODEL.

    Args:
        target: the folder. smolctl's own files in it are replaced.
        config: of the network.
        plan: how the items are stored.
        items: every tensor under its Hugging Face name, in its stored form.
        tokenizer: written with the model.
        origin: written into the description.
        name: of the model, for `NAME_quantized.ckpt`.

    Returns:
        Files of others that were already there and were kept.

    Raises:
        WriteError: no room, no permission, or the disk returned different bytes than were written.
    """
    stored = stored_arrays(items)
    twice = 2 if plan.scheme == DYNAMIC else 1  # the .ckpt contains everything a second time
    needed = twice * sum(array.nbytes for array in stored.values())
    with write_errors(target), building(target) as folder:
        if lack := lack_of_room(folder, needed + min(SMALL_FILES, needed)):
            raise WriteError(
                f"{target}: the quantized model {lack}", "Free some space or choose another --out."
            )
        _write_files(folder, config, plan, items, stored, tokenizer, origin, name)
        written = {glob.escape(path.name): file_digest(path) for path in folder.iterdir()}
        write_record(folder, Record(QUANTIZED_MODEL, written))
        for path in folder.iterdir():
            sync_file(path)
        sync_folder(folder)
        _compare(folder, items, target)
        return put_in_place(folder, target)


@contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turn an error of the operating system into the reason and the remedy."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        # torch.save turns a short write into a RuntimeError that does not name the cause.
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise WriteError(
            f"{target}: cannot be written ({reason})", "Free some space or choose another --out."
        ) from error


def stored_arrays(items: Mapping[str, StoredTensor]) -> dict[str, Array]:
    """The items as the tensors of one safetensors file."""
    stored: dict[str, Array] = {}
    for name, item in items.items():
        if isinstance(item, np.ndarray):
            stored[name] = np.ascontiguousarray(item)
            continue
        stored[name + VALUES], stored[name + SCALES] = item.values, item.scales
        if isinstance(item, PackedMatrix) and item.offsets is not None:
            stored[name + OFFSETS] = item.offsets
    return stored


def _write_files(
    folder: Path,
    config: ModelConfig,
    plan: QuantizationPlan,
    items: Mapping[str, StoredTensor],
    stored: Mapping[str, Array],
    tokenizer: TokenizerFiles | None,
    origin: Origin,
    name: str,
) -> None:
    plain = plan.scheme == "bf16" and not config.needs_own_code  # needs no code of smolctl's
    write_model(
        folder,
        config,
        {name: as_tensor(array) for name, array in stored.items()},
        "bfloat16" if plan.scheme == "bf16" else "float32",
        tokenizer,
        quantization=None if plain else {"quant_method": FORMAT, "scheme": plan.scheme},
    )
    if plain:
        return
    description = describe(plan, items, origin)
    write_json(
        folder / DESCRIPTION,
        {
            **description,
            "config_sha256": file_digest(folder / "config.json"),
            "file": {
                "bytes": (folder / FILE).stat().st_size,
                "sha256": file_digest(folder / FILE),
                "header_sha256": header_digest(folder / FILE),
            },
        },
    )
    if plan.scheme == DYNAMIC:
        summary = {key: value for key, value in description.items() if key != "tensors"}
        _write_checkpoint(folder / f"{name}{CHECKPOINT_SUFFIX}", config, items, summary, tokenizer)


def describe(plan: QuantizationPlan, items: Mapping[str, StoredTensor], origin: Origin) -> dict[str, Any]:
    """The content of quantization.json, without the checksums."""
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "smolctl": __version__,
        "scheme": plan.scheme,
        "source": origin.document(),
        "calibrated": plan.options.calibrate,
        "skip": list(plan.options.skip),
        "bits_map": [list(pair) for pair in plan.options.bits_map],
        "tensors": {name: _entry(item) for name, item in items.items()},
    }
    if plan.scheme == DYNAMIC:
        description["activations"] = plan.options.activations
    return description


def _entry(item: StoredTensor) -> dict[str, Any]:
    shape = list(item.shape)
    if isinstance(item, np.ndarray):
        return {"shape": shape, "stored": name_of(item.dtype)}
    if isinstance(item, ScaledMatrix):
        return {"shape": shape, "stored": "int8", "bits": 8, "group": None}
    return {"shape": shape, "stored": f"int{item.bits}", "bits": item.bits, "group": item.group}


def _write_checkpoint(
    path: Path,
    config: ModelConfig,
    items: Mapping[str, StoredTensor],
    summary: Mapping[str, Any],
    tokenizer: TokenizerFiles | None,
) -> None:
    network = dynamic_network(config, items, str(summary["activations"]))
    content = {
        "state_dict": dynamic_state(network),
        "config": config.model_dump(mode="json"),
        "quantization": dict(summary),
        "smolctl": {"format": CHECKPOINT_FORMAT},
        "tokenizer": asdict(tokenizer) if tokenizer is not None else None,
    }
    torch.save(content, path)


def _compare(partial: Path, items: Mapping[str, StoredTensor], target: Path) -> None:
    """Read everything back with the readers that every command uses, and compare it."""
    for path in (partial, *partial.glob(f"*{CHECKPOINT_SUFFIX}")):
        found = stored_arrays(dict(open_source(str(path)).require_weights().stored()))
        expected = stored_arrays(items)
        same = found.keys() == expected.keys() and all(
            found[name].dtype == array.dtype and np.array_equal(found[name], array)
            for name, array in expected.items()
        )
        if not same:
            raise WriteError(
                f"{target}: the disk returned different values than were written", "Check the disk."
            )
