"""The compiled CPU engine: runs weights of every format as they are stored."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from smolctl.config import ModelConfig
from smolctl.cores import compute_threads
from smolctl.errors import SmolError
from smolctl.generation.engine import Cache, CancelledError, Engine, EngineBusyError, Logits
from smolctl.model.positions import check_capacity, rotary_angles
from smolctl.native.library import Batch, CacheBuffers, Layer, Library, Matrix, Model, Status
from smolctl.sources.arrays import BFLOAT16, Array, name_of
from smolctl.sources.quantized.packed import BLOCK, PackedMatrix
from smolctl.sources.quantized.scaled import dense
from smolctl.sources.shapes import HEAD, TABLE

Stored = Array | PackedMatrix

# `kind` of matrix.h, for float types and for the bits of a `PackedMatrix`.
KINDS = {np.dtype(np.float32): 0, BFLOAT16: 1, np.dtype(np.float16): 2}
INTEGERS = {8: 3, 4: 4, 5: 5}
# Vectors of a layer that only some networks have, in the order of `layer` in forward.c.
OPTIONAL = (
    *(f"self_attn.{name}_proj.bias" for name in "qkv"),
    *(f"self_attn.{name}_norm.weight" for name in "qk"),
)
# `format` of attention.h: the data types of the KV cache.
FORMATS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int8): 2}
KEYS = 16  # positions in a tile of keys, and padding of values: attention.h
# Tokens per call: enough for efficient matmuls, few enough for the caches.
CHUNK = 256
# Address space for a larger cache is reserved, and memory is allocated as it fills, in pages of 4 KB. NumPy
# asks for pages of 2 MB, of which the first short prompts would touch all. On SmolLM2-135M the small pages
# cost 7 % of the time of a token after 4,096 others (Zen 4, two threads, in turns).
RESERVED_BYTES = 1 << 29


def read_bytes(weights: Mapping[str, Stored]) -> int:
    """Bytes of the matrices that every token is multiplied with; of a table that is only looked up, one
    row.
    """
    tables = {"model.embed_positions.weight"} | ({TABLE} if HEAD in weights else set())
    return sum(
        stored.bytes if isinstance(stored, PackedMatrix) else stored.nbytes
        for name, stored in weights.items()
        if name not in tables and len(stored.shape) > 1
    )


def kind_of(weights: Mapping[str, Stored]) -> str:
    """The data types of the matrices, the most frequent first: "int4 + int8"."""
    sizes: Counter[str] = Counter()
    for stored in weights.values():
        kind = f"int{stored.bits}" if isinstance(stored, PackedMatrix) else name_of(stored.dtype)
        if len(stored.shape) > 1:
            sizes[kind] += math.prod(stored.shape)
    return " + ".join(kind for kind, _ in sizes.most_common())


def matrix_of(stored: Stored, keep: list[Array]) -> Matrix:
    """A matrix in the form of the compiled code, with padded columns if it needs them.

    Args:
        stored: (rows, columns), of a dtype in `KINDS` or packed.
        keep: receives every array that must outlive the result.
    """
    rows, columns = stored.shape
    width = columns + -columns % BLOCK

    def pointer(part: Array | None) -> int | None:
        if part is None:
            return None
        keep.append(np.ascontiguousarray(part))  # no copy of a mapped file
        return keep[-1].ctypes.data

    if isinstance(stored, PackedMatrix):
        parts = (stored.values, stored.scales, stored.offsets)
        return Matrix(INTEGERS[stored.bits], rows, width, stored.group, *map(pointer, parts))
    filled = stored
    if width > columns:
        filled = np.zeros((rows, width), stored.dtype)
        filled[:, :columns] = stored
    return Matrix(KINDS[filled.dtype], rows, width, BLOCK, pointer(filled), None, None)


def cache_dtype_of(config: ModelConfig, weights: Mapping[str, Stored]) -> np.dtype[Any]:
    """The data type of the KV cache: float16, or float32 if all weights are float32 or a value may overflow
    float16.

    The input of a projection comes from a norm, so its length is at most √hidden_size before the norm's
    weights. A row of the projection gives at most the product of the two lengths, and RoPE, which mixes two
    rows, at most √2 times that. A bias adds its own values, and if keys have a norm, only its weights count.
    If this bound is below float16's maximum, no text can cause an overflow.
    """
    if kind_of(weights) == "float32":
        return np.dtype(np.float32)
    largest = float(np.finfo(np.float16).max) / math.sqrt(2)

    def safe(index: int, name: str) -> bool:
        layer = f"model.layers.{index}."
        if name == "k" and config.use_qk_norm:
            weight = dense(weights[f"{layer}self_attn.k_norm.weight"])
            return bool(np.abs(weight).max() * math.sqrt(config.head_dim) < largest)
        bias = weights.get(f"{layer}self_attn.{name}_proj.bias")
        added = 0.0 if bias is None else float(np.abs(dense(bias)).max())
        limit = max(largest - added, 0) / math.sqrt(config.hidden_size)
        norm = dense(weights[f"{layer}input_layernorm.weight"])
        stored = weights[f"{layer}self_attn.{name}_proj.weight"]  # (rows, hidden_size)
        if isinstance(stored, PackedMatrix):  # its scales usually suffice
            squares = np.add.reduceat(norm**2, np.arange(0, len(norm), stored.group))
            if (stored.largest() ** 2 @ squares).max() < limit**2:
                return True
        return bool(np.linalg.norm(dense(stored) * norm, axis=1).max() < limit)

    with np.errstate(over="ignore", invalid="ignore"):
        fits = all(safe(index, name) for index in range(config.num_hidden_layers) for name in "kv")
    return np.dtype(np.float16 if fits else np.float32)


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any], reserve: bool) -> Array:
    """An uninitialized array; with `reserve`, memory is allocated when it is written."""
    if not reserve or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.empty(shape, dtype)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


class NativeCache(Cache):
    """Keys in tiles and values in rows, in the layout of attention.h.

    With int8, each position of each head has a float32 scale for its key and one for its value.
    """

    def __init__(self, config: ModelConfig, sequences: int, capacity: int, dtype: np.dtype[Any]) -> None:
        super().__init__(sequences, capacity)
        room = capacity + -capacity % KEYS
        layers, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        stride = width + -width % KEYS
        rows = layers * sequences * heads * room
        reserve = rows * (width + stride) * dtype.itemsize > RESERVED_BYTES
        self.keys = _empty((layers, sequences, heads, room // KEYS, width, KEYS), dtype, reserve)
        self.values = _empty((layers, sequences, heads, room, stride), dtype, reserve)
        scales = (2, layers, sequences, heads, room) if dtype == np.int8 else (2, 0)
        self.scales = np.zeros(scales, np.float32)  # of keys and values
        self.buffers = CacheBuffers(
            self.keys.ctypes.data,
            self.values.ctypes.data,
            *(part.ctypes.data for part in self.scales),
            FORMATS[dtype],
            sequences,
            room,
            stride,
        )

    def copy(self, source: int, target: int) -> None:
        length = self.lengths[source]
        tiles = (length + KEYS - 1) // KEYS
        self.keys[:, target, :, :tiles] = self.keys[:, source, :, :tiles]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
        if self.scales.size:
            self.scales[:, :, target, :, :length] = self.scales[:, :, source, :, :length]
        self.lengths[target] = length


class NativeEngine(Engine):
    """Runs weights as they are stored, on up to `threads` threads of its own that sleep between calls.

    The compiled code runs one call at a time: calls from several Python threads take turns after every chunk
    of tokens.

    Args:
        library: the build to use.
        config: the model's shape.
        weights: every tensor by its Hugging Face name, except a tied head.
        threads: the maximum; None: see `compute_threads`.
        int8_cache: store keys and values in 8 bits instead of the type that `cache_dtype_of` chooses.
    """

    is_uniform = True

    def __init__(
        self,
        library: Library,
        config: ModelConfig,
        weights: Mapping[str, Stored],
        threads: int | None = None,
        int8_cache: bool = False,
    ) -> None:
        self.precision, self.weight_bytes = kind_of(weights), read_bytes(weights)
        super().__init__(config, f"native {library.build}, {self.precision}")
        # If all weights are float32, so is everything else: the same text as from any other engine.
        self.cache_dtype = np.dtype(np.int8) if int8_cache else cache_dtype_of(config, weights)
        self.library = library
        self.threads = threads or compute_threads()
        self._keep: list[Array] = []
        self._model = self._describe(weights)
        self._reset()
        self.exact_tokens = library.functions.smolctl_exact(self._open())
        _ENGINES.add(self)

    def _reset(self) -> None:
        """Start without threads and buffers: in a new engine, and in a forked process, which inherits no
        threads.
        """
        self._turn = threading.Lock()  # held by the thread that is running compiled code
        self._context: int | None = None

    def _describe(self, weights: Mapping[str, Stored]) -> Model:
        config, keep = self.config, self._keep

        def floats(name: str) -> int:
            keep.append(np.ascontiguousarray(dense(weights[name])))
            return keep[-1].ctypes.data

        def given(name: str) -> int | None:
            return floats(name) if name in weights else None

        def matrix(name: str) -> Matrix:
            return matrix_of(weights[name], keep)

        self._layers = (Layer * config.num_hidden_layers)()
        for index in range(config.num_hidden_layers):
            prefix = f"model.layers.{index}."
            self._layers[index] = Layer(
                *(matrix(f"{prefix}self_attn.{name}_proj.weight") for name in "qkvo"),
                *(matrix(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up", "down")),
                floats(f"{prefix}input_layernorm.weight"),
                floats(f"{prefix}post_attention_layernorm.weight"),
                *(given(prefix + name) for name in OPTIONAL),
                config.rotates(index),
            )
        table = matrix(TABLE)
        return Model(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
            config.rms_norm_eps,
            config.residual_scale,
            self._layers,
            table,
            matrix(HEAD) if HEAD in weights else table,
            floats("model.norm.weight"),
            floats("model.embed_positions.weight") if config.position_embedding == "learned" else None,
        )

    def _open(self) -> int:
        """The context with its threads and buffers, created if there is none."""
        if self._context is None:
            create = self.library.functions.smolctl_create
            self._context = create(ctypes.byref(self._model), CHUNK, self.threads)
        if self._context is None:
            raise SmolError("out of memory for the buffers of the network", "Close other programs.")
        return self._context

    def _close(self) -> None:
        if self._context is not None and self.library.functions.smolctl_destroy(self._context) == Status.BUSY:
            raise EngineBusyError
        self._context = None

    def __del__(self) -> None:
        if hasattr(self, "_context"):
            self._close()

    def allocate(self, sequences: int, capacity: int) -> NativeCache:
        check_capacity(self.config, capacity)
        with self._turn:
            if self.config.position_embedding == "rope" and capacity > self._model.rotary_positions:
                self._make_rotary(capacity)
        return NativeCache(self.config, sequences, capacity, self.cache_dtype)

    def _make_rotary(self, capacity: int) -> None:
        """Extend the table of RoPE's angles. The C context has a copy of the model's description, so it is
        created again.
        """
        self._close()
        angles = rotary_angles(self.config, capacity).astype(np.float64)
        self._rotary = np.stack((np.cos(angles), np.sin(angles))).astype(np.float32)
        self._model.rotary, self._model.rotary_positions = self._rotary.ctypes.data, capacity
        self._open()

    def forward(self, tokens: Sequence[Sequence[int]], cache: Cache, every: bool = False) -> Logits:
        assert isinstance(cache, NativeCache)
        self.check_room(tokens, cache)
        rows = [
            (token, sequence, cache.lengths[sequence] + at, every or at + 1 == len(ids))
            for sequence, ids in enumerate(tokens)
            for at, token in enumerate(ids)
        ]
        if any(not 0 <= row[0] < self.config.vocab_size for row in rows):
            raise IndexError(f"a token is outside the vocabulary of {self.config.vocab_size}")
        logits = np.empty((sum(row[3] for row in rows), self.config.vocab_size), np.float32)
        filled = 0
        for first, last in pairwise([*range(0, len(rows), CHUNK), len(rows)]):
            filled += self._forward(rows[first:last], cache, logits[filled:])
        for sequence, ids in enumerate(tokens):
            cache.lengths[sequence] += len(ids)
        return logits

    def _forward(self, rows: list[tuple[int, int, int, bool]], cache: NativeCache, logits: Logits) -> int:
        count = len(rows)
        wanted = [at for at, row in enumerate(rows) if row[3]]
        ints = ctypes.c_int32 * count
        tokens, sequences, positions = (ints(*column) for column in list(zip(*rows, strict=True))[:3])
        chosen = (ctypes.c_int32 * len(wanted))(*wanted)
        batch = Batch(
            count,
            ctypes.addressof(tokens),
            ctypes.addressof(sequences),
            ctypes.addressof(positions),
            cache.buffers,
            len(wanted),
            ctypes.addressof(chosen),
            logits.ctypes.data,
            ctypes.addressof(cache.cancellation.flag),
        )
        with self._turn:
            status = self.library.functions.smolctl_forward(self._open(), ctypes.byref(batch))
        if status == Status.NO_MEMORY:
            raise SmolError("out of memory while reading tokens", "Shorten the prompt.")
        if status == Status.BUSY:
            raise EngineBusyError
        if status == Status.CANCELLED:
            raise CancelledError
        return len(wanted)


_ENGINES: weakref.WeakSet[NativeEngine] = weakref.WeakSet()


def _reset_all() -> None:
    for engine in _ENGINES:
        engine._reset()


os.register_at_fork(after_in_child=_reset_all)
