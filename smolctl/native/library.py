"""Python bindings of the compiled forward pass: the build for this processor, and the C structures."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

from smolctl.native.build import levels

# Builds in the order of `smolctl_level` in forward.c. A processor that runs one also runs those before it.
BUILDS = tuple(levels())
# Selects a less demanding build for tests, or `none` for no build at all.
OVERRIDE = "SMOLCTL_NATIVE"
INTERFACE = 6  # of forward.c; includes the structures below


class Status(IntEnum):
    """`status` of forward.c."""

    DONE, NO_MEMORY, BUSY, CANCELLED = range(4)


class Matrix(Structure):
    """`matrix` of matrix.h."""

    _fields_ = [
        ("kind", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("group", c_int32),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
    ]


class Layer(Structure):
    """`layer` of forward.c."""

    _fields_ = [
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_attention_norm")),
        *((name, c_void_p) for name in ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm")),
        ("rotates", c_int32),
    ]


class Model(Structure):
    """`model` of forward.c."""

    _fields_ = [
        ("layer_count", c_int32),
        ("hidden_size", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate_size", c_int32),
        ("eps", c_float),
        ("residual_scale", c_float),
        ("layers", POINTER(Layer)),
        ("table", Matrix),
        ("head", Matrix),
        ("norm", c_void_p),
        ("positions", c_void_p),
        ("rotary", c_void_p),
        ("rotary_positions", c_int32),
    ]


class CacheBuffers(Structure):
    """`cache` of attention.h."""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("format", c_int32),
        ("sequences", c_int32),
        ("capacity", c_int32),
        ("value_stride", c_int32),
    ]


class Batch(Structure):
    """`batch` of forward.c."""

    _fields_ = [
        ("count", c_int32),
        ("tokens", c_void_p),
        ("sequences", c_void_p),
        ("positions", c_void_p),
        ("cache", CacheBuffers),
        ("wanted_count", c_int32),
        ("wanted", c_void_p),
        ("logits", c_void_p),
        ("cancelled", c_void_p),
    ]


@dataclass(frozen=True)
class Library:
    """A loaded build."""

    build: str  # "avx2", …
    functions: ctypes.CDLL


def library_path(build: str) -> Path:
    """The path of a build."""
    return Path(__file__).parent / f"forward_{build}.so"


@cache
def load_library() -> Library | str:
    """The best build that this processor runs, or the reason why there is none."""
    wanted = os.environ.get(OVERRIDE, "")
    if wanted == "none":
        return f"{OVERRIDE}=none"
    baseline = library_path(BUILDS[0])
    if not baseline.is_file():
        return "this installation was made without a compiler"
    try:
        level = _open(baseline).smolctl_level()
        usable = [name for name in BUILDS[: level + 1] if library_path(name).is_file()]
        if wanted and wanted not in usable:
            return f"{OVERRIDE}={wanted} is not among {', '.join(usable)}"
        build = wanted or usable[-1]
        return Library(build, _open(library_path(build)))
    except OSError as error:
        return f"the compiled engine cannot be loaded ({error})"


def _open(path: Path) -> ctypes.CDLL:
    functions = ctypes.CDLL(str(path))
    if getattr(functions, "smolctl_interface", int)() != INTERFACE:
        raise OSError("it was compiled from other sources: run `python -m smolctl.native.build`")
    functions.smolctl_create.argtypes = [POINTER(Model), c_int, c_int]
    functions.smolctl_create.restype = c_void_p
    functions.smolctl_forward.argtypes = [c_void_p, POINTER(Batch)]
    functions.smolctl_exact.argtypes = [c_void_p]
    functions.smolctl_destroy.argtypes = [c_void_p]
    functions.smolctl_multiply.argtypes = [POINTER(Matrix), c_void_p, c_int, c_void_p]
    return functions
