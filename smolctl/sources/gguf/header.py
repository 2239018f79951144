"""A reader for the header of a GGUF file. It takes 0.1 s; the `gguf` package takes 3 s, 0.5 s of them for its
import.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little endian: magic, version, number
of tensors, number of metadata pairs, the pairs, the tensors' names, sizes, types and offsets, padding to
`general.alignment`, the data. Every length is checked against the file before it is used.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolctl.errors import InputError
from smolctl.mapped import watch
from smolctl.sources.base import DAMAGED

GGUF_MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 used 32-bit counts and was replaced in 2023
LITTLE_ENDIAN = "Convert it with gguf_convert_endian of the gguf package, or download the usual file."
ANOTHER_VERSION = "Convert the model with a current llama.cpp, or update smolctl if the file is newer."
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
K_BLOCK = 256  # values of a row that K-quants pack together (QK_K)

STRING, ARRAY = 8, 9
# Metadata type id -> struct code.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Tensor type id -> name, values per block, bytes per block (GGML_QUANT_SIZES in the `gguf` package).
TENSOR_TYPES = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 28: ("F64", 1, 8), 30: ("BF16", 1, 2)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24)},
    **{8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 41: ("Q1_0", 128, 18)},
    **{10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176)},
    **{14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 22: ("IQ2_S", 256, 82)},
    **{18: ("IQ3_XXS", 256, 98), 21: ("IQ3_S", 256, 110), 19: ("IQ1_S", 256, 50), 29: ("IQ1_M", 256, 56)},
    **{20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
    **{39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36)},
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]  # row-major as in PyTorch; the file stores it reversed
    type: str  # llama.cpp's name: "Q4_1"; "type 99" if it is newer than this table
    offset: int  # from the start of the file
    bytes: int  # 0 if the type is not known


class Strings(Sequence[str]):
    """An array of strings that is decoded at the first access: a vocabulary has 100,000."""

    def __init__(self, raw: bytes, count: int) -> None:
        self._raw, self._count = raw, count
        self._texts: list[str] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._decoded()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded())

    def _decoded(self) -> list[str]:
        if self._texts is None:
            self._texts, end, length_at = [], 0, struct.Struct("<Q").unpack_from
            for _ in range(self._count):
                start = end + 8
                end = start + length_at(self._raw, end)[0]
                self._texts.append(self._raw[start:end].decode("utf-8", "replace"))
        return self._texts


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensors of a file."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]


def read_header(path: Path) -> GGUFHeader:
    """Read and check everything before the data.

    Raises:
        InputError: not a GGUF, an unknown version, a truncated or damaged header, or tensors that exceed the
            file.
    """
    try:
        watch(path)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
        raise InputError(f"{path}: cannot be read as GGUF ({error})", DAMAGED) from None


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size = path, data, len(data)
        self.position = 0

    def fail(self, reason: str, remedy: str = DAMAGED) -> InputError:
        return InputError(f"{self.path}: {reason}", remedy)

    def header(self) -> GGUFHeader:
        if self.take(4) != GGUF_MAGIC:
            raise self.fail(f"not a GGUF: it begins with {self.data[:4]!r}")
        version = self.scalar("I")
        if version not in VERSIONS:
            if version and version & 0xFFFF == 0:
                raise self.fail("big-endian GGUF is not supported", LITTLE_ENDIAN)
            raise self.fail(f"GGUF version {version} is not supported, only 2 and 3", ANOTHER_VERSION)
        tensor_count, pair_count = self.scalar("Q"), self.scalar("Q")
        # A pair takes at least 13 bytes and a tensor 24, so larger counts mean a damaged file.
        if pair_count * 13 + tensor_count * 24 > self.size:
            raise self.fail(
                f"damaged header: {tensor_count:,} tensors and {pair_count:,} keys in {self.size:,} bytes"
            )
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.string("a metadata key")
            if key in metadata:
                raise self.fail(f"damaged header: the key {key[:80]} comes twice")
            metadata[key] = self.value(self.scalar("I"), key)
        entries = [self.tensor_entry() for _ in range(tensor_count)]
        return GGUFHeader(self.path, version, metadata, self.placed(entries, metadata))

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self.size:
            raise self.fail(f"truncated: the header ends past the end of the file ({self.size:,} bytes)")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self, what: str) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"damaged header: {what} is not UTF-8") from None

    def value(self, type_id: int, key: str) -> Any:
        if type_id in SCALARS:
            return self.scalar(SCALARS[type_id])
        if type_id == STRING:
            return self.string(key)
        if type_id == ARRAY:
            return self.array(key)
        raise self.fail(f"damaged header: {key[:80]} has the unknown type {type_id}")

    def array(self, key: str) -> Sequence[Any]:
        item, count = self.scalar("I"), self.scalar("Q")
        if item in SCALARS:
            code = SCALARS[item]
            raw = self.take(count * struct.calcsize(code))
            return struct.unpack(f"<{count}{code}", raw)
        if item != STRING:
            raise self.fail(f"damaged header: {key[:80]} is an array of the unknown type {item}")
        return self.strings(key, count)

    def strings(self, key: str, count: int) -> Strings:
        """Skip an array of strings without decoding it."""
        start = position = self.position
        data, size, length_at = self.data, self.size, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position + 8 > size:
                raise self.fail(f"truncated: {key[:80]} has {count:,} strings, more than the file holds")
            position += 8 + length_at(data, position)[0]
        self.position = start
        return Strings(self.take(position - start), count)

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor's name")
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.fail(f"damaged header: tensor {name[:80]} has {dimensions} dimensions")
        shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))))
        return name, shape, self.scalar("I"), self.scalar("Q")

    def placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any]
    ) -> tuple[GGUFTensor, ...]:
        """The tensors with their positions in the file, checked against its size and each other."""
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise self.fail(f"damaged header: general.alignment is {alignment!r}")
        start = -(-self.position // alignment) * alignment
        tensors = [self.place(*entry, start, alignment) for entry in entries]
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise self.fail("damaged header: a tensor name comes twice")
        end = start
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self.fail(f"damaged header: tensor {tensor.name} overlaps another one")
            end = tensor.offset + tensor.bytes
            if end > self.size:
                raise self.fail(f"truncated: {tensor.name} ends at byte {end:,} of {self.size:,}")
        return tuple(tensors)

    def place(
        self, name: str, shape: tuple[int, ...], type_id: int, offset: int, start: int, alignment: int
    ) -> GGUFTensor:
        # A type that is newer than the table has no known size, but its values can be counted.
        values, (kind, block, size) = math.prod(shape), TENSOR_TYPES.get(type_id, (f"type {type_id}", 1, 0))
        if not values or shape[-1] % block or offset % alignment:
            entry = f"tensor {name[:80]} of shape {list(shape)} in {kind} at {offset}"
            raise self.fail(f"damaged header: {entry}")
        return GGUFTensor(name, shape, kind, start + offset, values // block * size)


def as_written(value: Any) -> Any:
    """The number before rounding to float32: 1e-5, if the file has 9.999999747e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
