"""Quantized models as a MODEL: the folder that `quantize` writes.

A folder contains `model.safetensors` and `quantization.json`, which describes every tensor in it. A packed
matrix NAME is stored as `NAME.values`, `NAME.scales` and, with 4 bits, `NAME.offsets` (see
`quantized/packed.py`); with the scheme int8-dynamic as `NAME.values` and `NAME.scales` in float32, either one
scale or one per row. Everything else is stored under its own name.

Opening reads the headers and compares the file's size and the SHA-256 of its header with the recorded ones.
Requesting weights first compares the SHA-256 of the whole file (about a millisecond per megabyte), then
memory-maps it: a model that was truncated, replaced or changed in a single bit never runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NotRequired, get_args

from pydantic import Field
from typing_extensions import TypedDict

from smolctl.config.model import MAX_WIDTH
from smolctl.durable import file_digest
from smolctl.errors import InputError
from smolctl.outside import checked, read_json, shown
from smolctl.sources.base import ModelSource, SourceKind, TensorHeader, Weights
from smolctl.sources.huggingface.config import from_huggingface_config
from smolctl.sources.huggingface.folder import SINGLE
from smolctl.sources.huggingface.safetensors_file import mapped_arrays, read_header
from smolctl.sources.huggingface.tokenizer import tokenizer_reader
from smolctl.sources.shapes import check_tensors

if TYPE_CHECKING:
    from smolctl.sources.arrays import Array
    from smolctl.sources.quantized.scaled import StoredTensor

DESCRIPTION = "quantization.json"
FILE = SINGLE
FORMAT, VERSION = "smolctl-quantized", 1
REMEDY = "Copy the folder again, or run `smolctl quantize` again: it is damaged, changed or not complete."
VALUES, SCALES, OFFSETS = ".values", ".scales", ".offsets"
PackedScheme = Literal["int8", "int4"]
DYNAMIC: Final = "int8-dynamic"
FolderScheme = Literal[PackedScheme, "int8-dynamic", "bf16"]  # that a folder may be written in

Size = Annotated[int, Field(strict=True, ge=0)]


class _File(TypedDict):
    bytes: Size
    sha256: str
    header_sha256: str


class _Entry(TypedDict):
    shape: list[Size]
    stored: str
    bits: NotRequired[Size | None]
    group: NotRequired[Annotated[int, Field(strict=True, ge=0, le=MAX_WIDTH)] | None]


class _Source(TypedDict):
    id: str
    step: NotRequired[int | None]


class Made(TypedDict):
    """How a model was quantized."""

    scheme: FolderScheme
    source: _Source
    activations: NotRequired[Literal["per-tensor", "per-token"]]


class _Description(Made):
    """The relevant part of a quantization.json."""

    bits_map: NotRequired[list[tuple[str, int]]]  # that was asked for; files of older versions do not say
    config_sha256: str
    file: _File
    tensors: dict[str, _Entry]


def is_quantized_folder(folder: Path) -> bool:
    """Whether a folder was written by `quantize`."""
    return (folder / DESCRIPTION).is_file()


def read_description(folder: Path) -> dict[str, Any]:
    """Read a quantization.json.

    Raises:
        InputError: it is damaged, or from a newer smolctl.
    """
    path = folder / DESCRIPTION
    content = read_json(path, REMEDY)
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: not a description of a quantized model", REMEDY)
    if content.get("version") != VERSION:
        raise InputError(
            f"{path}: format version {shown(content.get('version'))}, this smolctl reads {VERSION}",
            "Update smolctl, or quantize the model again.",
        )
    checked(_Description, content, str(path), REMEDY)
    for name, entry in content["tensors"].items():
        if not _fits(content, entry):
            raise InputError(
                f"{path}: {name} is stored as the scheme {content['scheme']} stores no tensor", REMEDY
            )
    return content


def _fits(description: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether the scheme of a folder can be that of one of its tensors."""
    scheme, bits = description["scheme"], entry.get("bits")
    if bits is None:
        return True  # of every scheme, where its integers cannot hold a tensor
    if entry.get("group") is None:
        return bool(scheme == DYNAMIC)
    asked_for = bits == 8 or scheme == "int4" or description.get("bits_map") != []
    return scheme in get_args(PackedScheme) and asked_for


def open_quantized_folder(folder: Path, name: str) -> ModelSource:
    """Open a folder by its headers.

    Raises:
        InputError: a file is missing, truncated, replaced or damaged.
    """
    description = read_description(folder)
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{path}: missing, although {DESCRIPTION} lists it", REMEDY)
    tensors = _described(description, read_header(path), path)
    _check_header(description, path)
    config_path = folder / "config.json"
    declared = read_json(config_path)
    config, unsupported = from_huggingface_config({**declared, "quantization_config": None}, str(config_path))
    if config is None:
        raise InputError(f"{config_path}: {unsupported}", REMEDY)
    if file_digest(config_path) != description["config_sha256"]:
        raise InputError(f"{config_path}: it has changed since it was written (checksum differs)", REMEDY)
    mismatches = check_tensors(config, tensors)
    if mismatches:
        raise InputError(f"{folder}: config.json is not this model's: {mismatches[0]}", REMEDY)
    return ModelSource(
        kind=SourceKind.QUANTIZED,
        id=name,
        config=config,
        declared=declared,
        tensors=tensors,
        weights=QuantizedWeights(path, description),
        quantization=description,
        tokenizer_reader=tokenizer_reader(folder),
    )


def header_digest(path: Path) -> str:
    """SHA-256 of a safetensors file's header, with its length."""
    with path.open("rb") as file:
        start = file.read(8)
        return hashlib.sha256(start + file.read(int.from_bytes(start, "little"))).hexdigest()


def _check_header(description: Mapping[str, Any], path: Path) -> None:
    recorded, size = description["file"], path.stat().st_size
    if recorded["bytes"] != size:
        raise InputError(f"{path}: has {size:,} bytes, but {recorded['bytes']:,} were written", REMEDY)
    if recorded["header_sha256"] != header_digest(path):
        raise InputError(f"{path}: its header has changed since it was written (checksum differs)", REMEDY)


def parts_of(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The stored tensors that make up one tensor of the model."""
    bits = entry.get("bits")
    if bits not in (4, 8):
        return (name,)
    return (name + VALUES, name + SCALES) + ((name + OFFSETS,) if bits == 4 else ())


def _described(
    description: Mapping[str, Any], stored: tuple[TensorHeader, ...], path: Path
) -> tuple[TensorHeader, ...]:
    """The model's own tensors as the plan describes them, checked against the file."""
    found = {tensor.name: tensor for tensor in stored}
    tensors = []
    for name, entry in description["tensors"].items():
        parts = parts_of(name, entry)
        missing = [part for part in parts if part not in found]
        if missing:
            raise InputError(f"{path}: has no {missing[0]}, although {DESCRIPTION} lists it", REMEDY)
        size = sum(found.pop(part).bytes for part in parts)
        tensors.append(TensorHeader(name, tuple(entry["shape"]), entry["stored"], size))
    if found:
        raise InputError(f"{path}: holds {next(iter(found))}, which {DESCRIPTION} does not list", REMEDY)
    return tuple(tensors)


class QuantizedWeights(Weights):
    """The tensors of a quantized folder, memory-mapped after the file's checksum was compared."""

    def __init__(self, path: Path, description: Mapping[str, Any]) -> None:
        self.path, self.description = path, description

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        try:
            if file_digest(self.path) != self.description["file"]["sha256"]:
                raise InputError(
                    f"{self.path}: its bytes are not the ones that were written (checksum differs)", REMEDY
                )
            arrays = dict(mapped_arrays(self.path))
            for name, entry in self.description["tensors"].items():
                found = [arrays[part] for part in parts_of(name, entry)]
                yield name, found[0] if len(found) == 1 else _matrix(entry, found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: cannot be read ({error})", REMEDY) from None


def _matrix(entry: Mapping[str, Any], parts: list[Array]) -> StoredTensor:
    from smolctl.sources.quantized.packed import BLOCK, PackedMatrix
    from smolctl.sources.quantized.scaled import ScaledMatrix

    rows, columns = entry["shape"]
    values, scales = parts[:2]
    if entry.get("group") is None:
        if values.shape != (rows, columns) or scales.shape not in ((1,), (rows,)):
            raise ValueError(f"values of shape {values.shape} for a matrix of {rows} × {columns}")
        return ScaledMatrix(values, scales)
    bits, group = entry["bits"], entry["group"]
    padded = columns + -columns % BLOCK
    if group < BLOCK or group % BLOCK:
        raise ValueError(f"groups of {group}")
    integers = (rows, padded * bits // 8), "int8" if bits == 8 else "uint8"
    floats = (rows, -(-padded // group)), "float16"
    if [(part.shape, part.dtype.name) for part in parts] != [integers, *[floats] * (len(parts) - 1)]:
        raise ValueError(f"values of shape {values.shape} for a matrix of {rows} × {columns}")
    return PackedMatrix(bits, columns, group, values, scales, parts[2] if bits == 4 else None)
