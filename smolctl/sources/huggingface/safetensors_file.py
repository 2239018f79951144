"""A reader for safetensors files: headers in microseconds, weights memory-mapped, without torch.

A file consists of 8 bytes of header length (little endian), the header as JSON, and the data. Every entry has
a dtype, a shape and a range of the data. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from smolctl.errors import InputError
from smolctl.mapped import watch
from smolctl.outside import checked, parse_json, parse_object, read_file, refuse_pointer, shown
from smolctl.sources.base import DAMAGED, ArrayWeights, TensorHeader
from smolctl.sources.shapes import is_derived

if TYPE_CHECKING:
    from smolctl.sources.arrays import Array

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_NAME_BYTES = 255  # of a file, in all usual file systems
BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
# PyTorch's names of the types that an array can have.
TYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "C64": "complex64"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}


class _Index(TypedDict):
    """The relevant part of a model.safetensors.index.json."""

    weight_map: dict[str, str]


def is_safetensors(start: bytes) -> bool:
    """Whether a file starts like safetensors: a header length, then a JSON object."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES


def read_header(path: Path) -> tuple[TensorHeader, ...]:
    """Read all tensors that a file declares, checked against the file's size.

    Raises:
        InputError: the file is truncated, or its header is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(32)
            refuse_pointer(start, str(path))
            length = int.from_bytes(start[:8], "little")
            check_header_length(length, size, str(path))
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror})", "Check the path and its permissions."
        ) from None
    tensors = parse_header(text, size - 8 - length, str(path))
    if not tensors:
        raise InputError(f"{path}: holds no tensors", "Is this the file you meant?")
    return tensors


def check_header_length(length: int, file_size: int | None, origin: str) -> None:
    """Refuse a header that is longer than the format or the file allows."""
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{origin}: not a safetensors file (header of {length:,} bytes)", DAMAGED)
    if file_size is not None and (file_size < 8 or length > file_size - 8):
        raise InputError(f"{origin}: truncated: its header ends past the end of the file", DAMAGED)


def parse_header(text: bytes, data_size: int | None, origin: str) -> tuple[TensorHeader, ...]:
    """The tensors of a header, in the order of their data.

    Args:
        text: the JSON.
        data_size: bytes that follow the header; None if not known.
        origin: name of the file in an error.
    """
    try:
        entries = parse_json(text.decode())
    except ValueError as error:
        raise InputError(f"{origin}: the safetensors header cannot be read: {error}", DAMAGED) from None
    if not isinstance(entries, dict):
        raise InputError(f"{origin}: the safetensors header is not a JSON object", DAMAGED)
    placed = [_entry(name, entry, origin) for name, entry in entries.items() if name != "__metadata__"]
    placed.sort(key=lambda entry: entry[:2])
    position = 0
    for begin, end, tensor in placed:
        if begin != position:
            raise InputError(f"{origin}: {tensor.name} overlaps another tensor or leaves a gap", DAMAGED)
        position = end
    if data_size is not None and position > data_size:
        last = placed[-1][2].name
        raise InputError(
            f"{origin}: truncated: {last} ends at byte {position:,} of {data_size:,} bytes of data", DAMAGED
        )
    if data_size is not None and placed and position < data_size:
        raise InputError(
            f"{origin}: {data_size - position:,} bytes follow the last tensor, which is not valid",
            "Download or save the file again; the safetensors library refuses it too.",
        )
    return tuple(tensor for _, _, tensor in placed)


def _entry(name: str, entry: Any, origin: str) -> tuple[int, int, TensorHeader]:
    """A tensor with the range of its data."""
    try:
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        dtype = entry["dtype"]
        sizes = (*shape, begin, end)
        if any(type(size) is not int or size < 0 for size in sizes) or dtype not in BITS:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{origin}: the header's entry of {name[:80]!r} is damaged", DAMAGED) from None
    tensor = TensorHeader(name, shape, dtype, end - begin)
    if tensor.parameters * BITS[dtype] != 8 * tensor.bytes:
        raise InputError(
            f"{origin}: {name} of shape {list(shape)} does not fit its {tensor.bytes:,} bytes", DAMAGED
        )
    return begin, end, tensor


def read_shards(folder: Path, index: Path) -> tuple[dict[Path, list[str]], tuple[TensorHeader, ...]]:
    """Read the files that an index names, and all their tensors.

    Raises:
        InputError: the index is damaged, a shard is missing, or as in `promised_tensors`.
    """
    promised = read_weight_map(read_file(index, DAMAGED), str(index))
    shards = {folder / file_name: names for file_name, names in promised.items()}
    headers = {}
    for path in shards:
        if not path.is_file():
            raise InputError(f"{path}: missing, although {index.name} lists it", "Download the missing file.")
        headers[str(path)] = read_header(path)
    return shards, promised_tensors({str(path): names for path, names in shards.items()}, headers)


def promised_tensors(
    promised: Mapping[str, Sequence[str]], headers: Mapping[str, Sequence[TensorHeader]]
) -> tuple[TensorHeader, ...]:
    """The tensors that an index names, each from the file that it names for it.

    Args:
        promised: names by file, from the index.
        headers: the tensors in each of these files.

    Raises:
        InputError: a file lacks a tensor, or has one that the index assigns to another file: which of the two
            is meant is not known, and transformers uses the one that it reads last.
    """
    home = {name: path for path, names in promised.items() for name in names}
    tensors: list[TensorHeader] = []
    for path, names in promised.items():
        found = {tensor.name: tensor for tensor in headers[path]}
        for name in found:
            other = home.get(name, path)
            if other != path:
                raise InputError(
                    f"{path}: holds {name}, although the index of weights lists it in {Path(other).name}",
                    "Save the model again, so that every tensor lies in one file.",
                )
        for name in names:
            if name not in found:
                raise InputError(f"{path}: has no {name}, although the index of weights lists it", DAMAGED)
            tensors.append(found[name])
    return tuple(tensors)


def read_weight_map(text: bytes, origin: str) -> dict[str, list[str]]:
    """Files and the tensors in them, from a `model.safetensors.index.json`; names stay inside the folder."""
    index = checked(_Index, parse_object(text, origin, DAMAGED), origin, DAMAGED)
    by_file: dict[str, list[str]] = {}
    for name, file_name in index["weight_map"].items():
        if Path(file_name).name != file_name:
            raise InputError(f"{origin}: names a file outside its folder: {shown(file_name)}", DAMAGED)
        if not (file_name and file_name.isprintable() and len(file_name.encode()) <= MAX_NAME_BYTES):
            raise InputError(f"{origin}: weight_map: {shown(file_name)} is not the name of a file", DAMAGED)
        by_file.setdefault(file_name, []).append(name)
    return by_file


class SafetensorsWeights(ArrayWeights):
    """Memory-mapped tensors of one or more files.

    Args:
        files: paths with the names to read from each, or None for all of them.
    """

    def __init__(self, files: Mapping[Path, Sequence[str] | None]) -> None:
        self.files = files

    def stored(self) -> Iterator[tuple[str, Array]]:
        for path, names in self.files.items():
            wanted = None if names is None else set(names)
            for name, array in mapped_arrays(path):
                if not is_derived(name) and (wanted is None or name in wanted):
                    yield name, array


def mapped_arrays(path: Path) -> Iterator[tuple[str, Array]]:
    """Every tensor of a file, in the memory-mapped file; writing changes a private copy.

    Raises:
        InputError: the file cannot be read, is damaged, or has a type that arrays do not support.
    """
    import numpy as np

    from smolctl.sources.arrays import type_named

    tensors = read_header(path)
    try:
        watch(path)
        with path.open("rb") as file:
            position = 8 + int.from_bytes(file.read(8), "little")
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})", DAMAGED) from None
    for tensor in tensors:  # in the order of their data, which has no gaps
        if tensor.dtype not in TYPES:
            raise InputError(
                f"{path}: tensors of type {tensor.dtype} cannot be read", "Save the model in another type."
            )
        raw = data[position : position + tensor.bytes]
        dtype = type_named(TYPES[tensor.dtype], BITS[tensor.dtype] // 8)
        yield tensor.name, np.require(raw.view(dtype), requirements="A").reshape(tensor.shape)
        position += tensor.bytes
