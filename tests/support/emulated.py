"""Builds of the compiled engine for ARM, which qemu emulates on other machines.

The functions of forward.c run in a process of their own, see emulated.c. A call sends the memory that its
structures point to, and what the call wrote comes back.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from ctypes import Structure
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from smolctl.native import build
from smolctl.native.library import Batch, Layer, Library, Matrix, Model

# Builds by the least processor of qemu 7.2 that runs each: without dot products of bytes, with them, and with
# products of small matrices too.
ARM = {"arm baseline": "cortex-a53", "arm dotprod": "cortex-a76", "arm bf16": "max"}
# Static, so that qemu needs no libraries of that processor.
TARGET = "aarch64-linux-musl"
BITS = (32, 16, 16, 8, 4, 5)  # of a value of each `kind` of matrix.h
CONTEXT = 1500  # positions of a learned table, whose length the structures do not say
CACHED_BYTES = (4, 2, 1)  # of one in each `format` of attention.h; the last one has scales


class Function(IntEnum):
    """What emulated.c can be asked for."""

    LEVEL, MULTIPLY, CREATE, FORWARD, DESTROY, EXACT = range(6)


class Memory:
    """Structures and what they point to, one after the other; pointers in it are places in it."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.pointers: list[int] = []
        self.parts: list[tuple[int, int, int]] = []  # place, address and size

    def add(self, address: int, size: int) -> int:
        self.content += bytes(-len(self.content) % 64)
        place = len(self.content)
        self.content += ctypes.string_at(address, size)
        self.parts.append((place, address, size))
        return place

    def point(self, at: int, address: int | None, size: int) -> int | None:
        """Let the pointer at a place point to a copy of what is at an address."""
        if not address:
            return None
        place = self.add(address, size)
        struct.pack_into("<Q", self.content, at, place)
        self.pointers.append(at)
        return place

    def point_fields(self, at: int, owner: Structure, sizes: Mapping[str, int]) -> None:
        """Do so with fields of a structure at a place, whose sizes are given."""
        for name, size in sizes.items():
            self.point(at + getattr(type(owner), name).offset, getattr(owner, name), size)

    def point_matrix(self, at: int, matrix: Matrix) -> None:
        scales = matrix.rows * -(-matrix.columns // matrix.group) * 2
        values = matrix.rows * matrix.columns * BITS[matrix.kind] // 8
        self.point_fields(at, matrix, {"values": values, "scales": scales, "offsets": scales})

    def add_model(self, model: Model) -> None:
        self.add(ctypes.addressof(model), ctypes.sizeof(model))
        width, head = 4 * model.hidden_size, 4 * model.head_dim
        self.point_matrix(Model.table.offset, model.table)
        self.point_matrix(Model.head.offset, model.head)
        sizes = {"norm": width, "positions": CONTEXT * width, "rotary": model.rotary_positions * head}
        self.point_fields(0, model, sizes)
        sizes = {"input_norm": width, "post_attention_norm": width, "q_norm": head, "k_norm": head}
        sizes |= {
            "q_bias": model.heads * head,
            "k_bias": model.kv_heads * head,
            "v_bias": model.kv_heads * head,
        }
        size = ctypes.sizeof(Layer)
        first = self.point(Model.layers.offset, ctypes.addressof(model.layers[0]), model.layer_count * size)
        assert first is not None
        for index in range(model.layer_count):
            layer, at = model.layers[index], first + index * size
            self.point_fields(at, layer, sizes)
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                self.point_matrix(at + getattr(Layer, name).offset, getattr(layer, name))

    def add_batch(self, batch: Batch, model: Model) -> None:
        self.add(ctypes.addressof(batch), ctypes.sizeof(batch))
        ints = 4 * batch.count
        logits = 4 * batch.wanted_count * model.head.rows
        sizes = {"tokens": ints, "sequences": ints, "positions": ints, "wanted": 4 * batch.wanted_count}
        self.point_fields(0, batch, {**sizes, "logits": logits, "cancelled": 4})
        kept = batch.cache
        rows = model.layer_count * kept.sequences * model.kv_heads * kept.capacity
        width = rows * CACHED_BYTES[kept.format]
        scales = 4 * rows * (width == rows)
        sizes = {"keys": width * model.head_dim, "values": width * kept.value_stride}
        sizes |= {"key_scales": scales, "value_scales": scales}
        self.point_fields(Batch.cache.offset, kept, sizes)


class Emulated:
    """The functions of a build as `ctypes` has them, on a processor of qemu's."""

    def __init__(self, program: Path, processor: str) -> None:
        self._process = subprocess.Popen(
            [qemu(), "-cpu", processor, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        atexit.register(self._process.kill)
        self._models: dict[int, Model] = {}

    def _call(self, function: Function, *numbers: int, memory: Memory | None = None) -> int:
        memory = memory or Memory()
        first, second = (*numbers, 0, 0)[:2]
        sizes = len(memory.content), len(memory.pointers)
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(struct.pack("<5Q", function, first, second, *sizes))
        self._process.stdin.write(memory.content + struct.pack(f"<{sizes[1]}Q", *memory.pointers))
        self._process.stdin.flush()
        answer = self._process.stdout.read(8)
        assert answer, f"the emulated program ended with {self._process.wait()}"
        if function in (Function.MULTIPLY, Function.FORWARD):
            self._write_back(memory, self._process.stdout.read(sizes[0]))
        return int.from_bytes(answer, "little")

    @staticmethod
    def _write_back(memory: Memory, content: bytes) -> None:
        for place, address, size in memory.parts:
            after = content[place : place + size]
            if not any(place <= at < place + size for at in memory.pointers) and (
                after != memory.content[place : place + size]
            ):
                ctypes.memmove(address, after, size)

    def smolctl_level(self) -> int:
        return self._call(Function.LEVEL)

    def smolctl_multiply(self, matrix: Any, x: int, tokens: int, y: int) -> int:
        matrix, memory = matrix._obj, Memory()
        memory.content += bytes(24)
        place = memory.point(0, ctypes.addressof(matrix), ctypes.sizeof(matrix))
        assert place is not None
        memory.point_matrix(place, matrix)
        memory.point(8, x, 4 * tokens * matrix.columns)
        memory.point(16, y, 4 * tokens * matrix.rows)
        return self._call(Function.MULTIPLY, tokens, memory=memory)

    def smolctl_create(self, model: Any, chunk: int, threads: int) -> int:
        memory = Memory()
        memory.add_model(model._obj)
        context = self._call(Function.CREATE, chunk, threads, memory=memory)
        self._models[context] = model._obj
        return context

    def smolctl_forward(self, context: int, batch: Any) -> int:
        memory = Memory()
        memory.add_batch(batch._obj, self._models[context])
        return self._call(Function.FORWARD, context, memory=memory)

    def smolctl_exact(self, context: int) -> int:
        return self._call(Function.EXACT, context)

    def smolctl_destroy(self, context: int) -> int:
        return self._call(Function.DESTROY, context)


def qemu() -> str:
    """The emulator of processes, or a skip."""
    found = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not found:
        pytest.skip("no emulator of ARM processors: apt-get install -y qemu-user-static")
    return found


@cache
def program(level: str) -> Path:
    """The server with a level of `LEVELS`."""
    if not build.zig():
        pytest.skip("ziglang is not installed: it compiles for other processors")
    folder = Path(tempfile.mkdtemp(prefix="smolctl-arm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    zig, made = build.zig()[0], folder / "server"
    source = str(build.HERE / "forward.c")
    options = build.zig_options(build.LEVELS["Linux", "aarch64"][level], TARGET)
    subprocess.run([*zig, *build.FLAGS, *options, "-c", source, "-o", f"{made}.o"], check=True)
    # The C library for one processor in all of them: it takes a while to compile, and zig keeps it.
    server = str(Path(__file__).with_suffix(".c"))
    subprocess.run([*zig, "-target", TARGET, "-static", server, f"{made}.o", "-o", made], check=True)
    return made


@cache
def emulated(level: str, processor: str) -> Emulated:
    """A level of `LEVELS` on a processor of qemu's."""
    qemu()
    return Emulated(program(level), processor)


def emulated_library(name: str) -> Library:
    """A build of `ARM`."""
    functions = emulated(name.removeprefix("arm "), ARM[name])
    return Library(name, functions)  # type: ignore[arg-type]
