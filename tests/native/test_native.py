"""The compiled engine computes what the reference path computes: products, logits, caches."""

from __future__ import annotations

import argparse
import ctypes
import functools
import math
import mmap
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smolctl.config import ModelConfig
from smolctl.cores import usable_cpus
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError, UsageError
from smolctl.generation.engines import EngineOptions, make_engine
from smolctl.generation.native_engine import (
    RESERVED_BYTES,
    NativeCache,
    NativeEngine,
    Stored,
    cache_dtype_of,
    kind_of,
    matrix_of,
)
from smolctl.generation.sampling import SamplingSettings
from smolctl.generation.scheduler import Scheduler, Speculation
from smolctl.generation.torch_engine import TorchEngine
from smolctl.model.weights import from_state, initialize
from smolctl.native.library import BUILDS, OVERRIDE, Library, load_library
from smolctl.sources import open_source
from smolctl.sources.arrays import Array, as_array
from smolctl.sources.base import ModelSource, SourceKind, StateWeights
from smolctl.sources.quantized import scaled
from smolctl.sources.quantized.packed import BLOCK, PackedMatrix, pack_integers
from smolctl.sources.quantized.scaled import ScaledMatrix
from smolctl.sources.shapes import check_state
from tests.support.emulated import CONTEXT
from tests.support.native import EMULATED, library
from tests.support.tiny_models import continue_prompt, run_requests
from tests.support.tiny_runs import ROPE

# Tokens of a call that gives each the bits of a call of its own: packed matrices, and others.
EXACT, FEW = 16, 4
DENSE = ["float32", "bfloat16", "float16"]
PACKED = [f"int{bits}{group}" for bits in (8, 5, 4) for group in ("", "/16")]


def pack(weight: Tensor, bits: int, group: int) -> PackedMatrix:
    """Plain rounding of (rows, columns) by groups."""
    rows, columns = weight.shape
    groups = -(-(columns + -columns % BLOCK) // group)
    grouped = torch.nn.functional.pad(weight, (0, groups * group - columns)).view(rows, groups, group)
    limits = (-127, 127) if bits == 8 else (0, 2**bits - 1)
    low = torch.zeros(rows, groups, 1) if bits == 8 else grouped.amin(-1, keepdim=True)
    top = (grouped - low).abs().amax(-1, keepdim=True) / limits[1]
    scales, offsets = top.half(), low.half()
    integers = ((grouped - offsets.float()) / scales.float().clamp_min(1e-6)).round().clamp(*limits)
    values = pack_integers(integers.view(rows, -1)[:, :columns].numpy(), bits)
    offset = None if bits == 8 else offsets.squeeze(-1).numpy()
    return PackedMatrix(bits, columns, group, values, scales.squeeze(-1).numpy(), offset)


def store(weight: Tensor, kind: str) -> Stored:
    """`kind`: a dtype, or "int8" in groups of 32, "int8/16" in groups of 16, …"""
    dense = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if kind in dense:
        return as_array(weight.to(dense[kind]))
    bits, _, group = kind.removeprefix("int").partition("/")
    return pack(weight, int(bits), int(group or BLOCK))


def dense(stored: Stored) -> Tensor:
    return torch.from_numpy(scaled.dense(stored))


def product(build: str, stored: Stored, x: Tensor) -> Tensor:
    """x (tokens, columns) times a matrix (rows, columns), transposed, by itself in compiled code."""
    keep: list[Array] = []
    matrix = matrix_of(stored, keep)
    filled = torch.nn.functional.pad(x, (0, matrix.columns - x.shape[1])).contiguous()
    y = torch.empty(len(x), matrix.rows)
    multiply = library(build).functions.smolctl_multiply
    assert not multiply(ctypes.byref(matrix), filled.data_ptr(), len(x), y.data_ptr())
    return y


def is_narrow(build: str, kind: str, tokens: int) -> bool:
    """Whether a product rounds its inputs to bfloat16."""
    exact = EXACT if kind.startswith("int") else FEW
    return build.endswith("bf16") and kind != "float32" and tokens > exact


@pytest.mark.parametrize("build", [*BUILDS, *EMULATED])
@pytest.mark.parametrize("kind", [*DENSE, "int8", "int5", "int4"])
@given(data=st.data())
def test_products_equal_the_dequantized_matrix(build: str, kind: str, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 300))
    tokens = data.draw(st.one_of(st.integers(1, 9), st.integers(10, EXACT + 3)))
    group = data.draw(st.sampled_from([16, 32, 64, 96, 128]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, columns // 2] *= 100  # as real activations have it
    packed = kind.startswith("int")
    stored = store(weight, f"{kind}/{group}" if packed else kind)
    y = product(build, stored, x)

    expected = x.double() @ dense(stored).double().T
    # What the terms of a sum could add up to, times the rounding: once to bfloat16 where products of many
    # tokens use it, else to float32 after each addition.
    size = dense(stored).double().abs()
    exact = EXACT if packed else FEW
    narrow = is_narrow(build, kind, tokens)
    bound = (2**-7 if narrow else columns * 2**-24) * (x.double().abs() @ size.T)
    if packed and not narrow:  # x in 16-bit integers, times what stored integers add to their offset
        bound += 2**-15 * x.abs().max() * columns * size.amax(-1)
    assert ((y - expected).abs() <= bound + 1e-6).all()
    if tokens <= exact:  # to the last bit, in any company
        assert torch.equal(y[-1:], product(build, stored, x[-1:]))
        assert torch.equal(y[: tokens // 2], product(build, stored, x[: tokens // 2]))


@pytest.mark.parametrize("tokens", [1, FEW + 1, EXACT + 1])
@pytest.mark.parametrize("kind", [*DENSE, *PACKED])
@pytest.mark.parametrize("build", [*BUILDS, *EMULATED])
def test_products_of_numbers_at_the_limits(build: str, kind: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    stored = store(torch.randn(21, 200, generator=generator), kind)
    x = torch.randn(tokens, 200, generator=generator)
    for factor in (1e-45, 1e-38, 1e30):  # denormal, tiny, huge
        scaled_x = x * factor
        expected = scaled_x.double() @ dense(stored).double().T
        size = dense(stored).double().abs().sum(-1) * scaled_x.abs().max()
        bound = (2**-7 if is_narrow(build, kind, tokens) else 2**-14) * size + 1e-27
        assert ((product(build, stored, scaled_x) - expected).abs() <= bound).all()
    assert not product(build, stored, x * 0).any()
    for wrong in (math.nan, math.inf, -math.inf):
        x[-1, 150] = wrong
        y = product(build, stored, x)
        assert not y[-1].isfinite().any()
        assert y[:-1].isfinite().all()


@pytest.mark.parametrize("build", [*BUILDS, *EMULATED])
def test_scales_of_the_next_row_do_not_reach_a_row(build: str) -> None:
    """What is read behind the last block of a row, whose scales lie next to those of the next."""
    for kind in ("int8", "int8/16"):
        stored = store(torch.ones(40, 96), kind)
        assert isinstance(stored, PackedMatrix)
        stored.scales[1::2] = math.nan
        for tokens in (1, FEW + 1):
            y = product(build, stored, torch.ones(tokens, 96))
            assert y[:, ::2].isfinite().all()
            assert not (y[:, 1::2].abs() < 1e6).any()  # NaN, or what builds without float16 make of it


SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, **ROPE},
    "learned": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
    "odd": {"hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 10, **ROPE},
    "odd head": {"hidden_size": 45, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 15},
    "wide heads": {
        "hidden_size": 40,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 80,
        **ROPE,
    },
    "untied": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
}


def config_of(shape: str) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": 131,
        "intermediate_size": 70,
        "num_hidden_layers": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.15,
    }
    return ModelConfig(**{**values, **SHAPES[shape]})


def engines(
    config: ModelConfig, kind: str, build: str, threads: int = 2, factor: float = 1.0
) -> tuple[NativeEngine, TorchEngine]:
    """The compiled engine, and PyTorch on the very same numbers. `factor`: of all keys and values."""
    state = initialize(config, 3).eval().requires_grad_(False).state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            tensor *= factor
    weights = {name: store(t, kind if t.dim() > 1 else "float32") for name, t in state.items()}
    network = from_state(config, {name: dense(stored) for name, stored in weights.items()}, "test").eval()
    native = NativeEngine(library(build), config, weights, threads)
    return native, TorchEngine(network.requires_grad_(False))


def logits_of(engine: NativeEngine | TorchEngine, parts: list[list[list[int]]], capacity: int) -> Tensor:
    cache = engine.allocate(len(parts[0]), capacity)
    return torch.from_numpy(np.concatenate([engine.forward(part, cache, every=True) for part in parts]))


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 131, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("build", [*BUILDS, *EMULATED])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_logits_equal_the_reference_network(shape: str, build: str) -> None:
    native, reference = engines(config_of(shape), "float32", build)
    prompt = ids(41)
    parts = [[prompt[:30]], [prompt[30:31]], [prompt[31:32]], [prompt[32:]]]
    ours, theirs = (logits_of(engine, parts, 64) for engine in (native, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("build", [*BUILDS, *EMULATED])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("shape", ["grouped", "learned", "odd"])
def test_stored_formats_give_the_logits_of_their_dequantized_weights(
    shape: str, kind: str, build: str
) -> None:
    native, reference = engines(config_of(shape), kind, build)
    parts = [[ids(20)], [ids(1, 1)], [ids(1, 2)]]
    ours, theirs = (logits_of(engine, parts, 32) for engine in (native, reference))
    # Activations in bfloat16 and a cache in float16 move logits a little.
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.8


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_long_contexts_are_split_and_put_together(threads: int) -> None:
    native, reference = engines(config_of("grouped"), "float32", load_build(), threads)
    prompt = ids(1300)
    parts = [[prompt[:700]], [prompt[700:701]], [prompt[701:1299]], [prompt[1299:]]]
    ours, theirs = (logits_of(engine, parts, 1300) for engine in (native, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4 * theirs.abs().max().item())


def load_build() -> str:
    found = load_library()
    assert isinstance(found, Library), found
    return found.build


def test_sequences_of_different_length_do_not_see_each_other() -> None:
    native, reference = engines(config_of("grouped"), "float32", load_build())
    prompts = [ids(5, 1), ids(17, 2), ids(1, 3)]
    cache = native.allocate(3, 40)
    first = native.forward(prompts, cache)
    second = native.forward([[7], [], [9]], cache)
    assert cache.lengths == [6, 17, 2]
    for row, prompt in enumerate(prompts):
        alone = reference.forward([prompt], reference.allocate(1, 40))
        np.testing.assert_allclose(first[row : row + 1], alone, rtol=1e-4, atol=1e-3)
    for row, prompt in ((0, [*prompts[0], 7]), (1, [*prompts[2], 9])):
        alone = reference.forward([prompt], reference.allocate(1, 40))
        np.testing.assert_allclose(second[row : row + 1], alone, rtol=1e-4, atol=1e-3)


def test_a_cut_or_copied_cache_goes_on_as_if_it_had_been_read_so() -> None:
    native, _ = engines(config_of("grouped"), "float32", load_build())
    prompt = ids(30)
    cache = native.allocate(2, 60)
    native.forward([prompt, ids(9, 5)], cache)
    cache.truncate(0, 20)
    cache.copy(0, 1)
    both = native.forward([[3], [3]], cache)
    fresh = native.allocate(1, 60)
    native.forward([prompt[:20]], fresh)
    assert np.array_equal(both[0], both[1])
    np.testing.assert_allclose(both[:1], native.forward([[3]], fresh), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("build", [*BUILDS, *EMULATED])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *((kind, shape) for kind in ("float32", "int4") for shape in ("grouped", "learned", "odd")),
        *((kind, "odd") for kind in ("bfloat16", "int8", "int5", "int8/16", "int4/16", "int5/16")),
    ],
)
def test_a_few_tokens_in_a_call_have_the_bits_of_calls_with_one(shape: str, kind: str, build: str) -> None:
    native, _ = engines(config_of(shape), kind, build)
    prompt, tokens = [ids(110)], ids(40, 1)  # across the end of the context's first part, at 128
    one_by_one = logits_of(native, [prompt, *([[token]] for token in tokens)], 256)
    assert native.exact_tokens == (EXACT if kind.startswith("int") else FEW)
    for size in {2, 3, FEW, native.exact_tokens // 2 + 1, native.exact_tokens}:
        parts = [[tokens[at : at + size]] for at in range(0, len(tokens), size)]
        assert torch.equal(logits_of(native, [prompt, *parts], 256), one_by_one)
    two = native.allocate(2, 256)
    native.forward([prompt[0], []], two)
    native.forward([[], ids(90, 2)], two)
    for expected, token, other in zip(one_by_one[len(prompt[0]) :], tokens, ids(40, 3), strict=True):
        assert np.array_equal(native.forward([[token], [other]], two)[0], expected)


@pytest.mark.parametrize("build", [*BUILDS[1:], *EMULATED])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_every_build_continues_a_text_alike(kind: str, build: str) -> None:
    said = [
        continue_prompt(engines(config_of("grouped"), kind, which)[0], ids(12), 24)
        for which in ("baseline", build)
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("build", [*BUILDS, *EMULATED])
def test_a_cache_in_8_bits_changes_logits_little_and_the_same_in_any_company(build: str) -> None:
    native, _ = engines(config_of("odd"), "int8", build)
    prompt, tokens = ids(120), ids(16, 1)  # across the end of the context's first part, at 128
    parts = [[prompt], *([[token]] for token in tokens)]
    exact = logits_of(native, parts, 160)
    native.cache_dtype = np.dtype(np.int8)
    one_by_one = logits_of(native, parts, 160)
    assert 0 < (one_by_one - exact).abs().max() < 0.05 * exact.abs().max()
    assert torch.equal(logits_of(native, [[prompt], [tokens]], 160), one_by_one)
    cache = native.allocate(2, 160)
    native.forward([[*prompt, *ids(9, 2)], ids(40, 3)], cache)
    cache.truncate(0, len(prompt))
    cache.copy(0, 1)
    both = native.forward([tokens[:1], tokens[:1]], cache)
    assert np.array_equal(both[0], both[1])
    kept = cache.keys.astype(np.float32) * cache.scales[0].reshape(2, 2, 1, -1, 1, 16)
    native.cache_dtype = np.dtype(np.float32)
    plain = native.allocate(2, 160)
    native.forward([prompt, ids(40, 3)], plain)
    tiles = len(prompt) // 16
    steps = cache.scales[0, 0, 0].reshape(1, -1, 1, 16)[:, :tiles]
    assert (np.abs(kept - plain.keys)[0, 0, :, :tiles] <= 0.501 * steps).all()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_speculation_changes_no_token_sampled_or_greedy(kind: str, temperature: float) -> None:
    native, _ = engines(config_of("grouped"), kind, "avx2" if kind == "int4" else "baseline")
    prompt, chosen_by = ids(9) * 4, SamplingSettings(temperature, top_p=0.5)
    tokens, drafted = {}, {}
    speculation: Speculation
    for speculation in ("off", "auto"):
        scheduler = Scheduler(native, 1, 400, chosen_by, speculation)
        tokens[speculation] = [token.id for token in run_requests(scheduler, [prompt], [300])[0]]
        drafted[speculation] = scheduler.counts.drafted
    assert tokens["auto"] == tokens["off"]
    assert drafted["off"] == 0 < drafted["auto"]


@pytest.mark.parametrize("build", [*BUILDS, *EMULATED])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_calls_of_many_tokens_give_each_the_same_bits_whatever_else_they_read(kind: str, build: str) -> None:
    native, _ = engines(config_of("grouped"), kind, build)
    tokens, many = ids(250), native.exact_tokens + 1
    found = []
    for cuts in ([], [many], [130, 130 + many], [64, 128, 192]):  # in one part of the context, and in several
        cache = native.allocate(2, 256)
        for first, last in pairwise([0, *cuts, len(tokens)]):
            company = ids(40, last)[: 5 * len(cuts)]
            native.forward([tokens[first:last], company], cache)
        found.append(native.forward([[3], []], cache))
    assert all(np.array_equal(logits, found[0]) for logits in found)


@functools.cache
def real_network(file: Path) -> tuple[ModelConfig, dict[str, Stored], list[list[list[int]]], Tensor]:
    """SmolLM2-135M-Instruct: shape, weights as they are stored, calls, and what these predict in float32.

    Calls: a prompt, as many tokens as have the bits of calls of their own, and one by one.
    """
    source = open_source(str(file))
    config = source.require_config()
    stored = check_state(config, dict(source.require_weights().stored()), source.id)
    weights = {name: one for name, one in stored.items() if not isinstance(one, ScaledMatrix)}
    exact = NativeEngine(
        library("baseline"), config, {name: scaled.dense(one) for name, one in weights.items()}
    )
    tokens = Tokenizer.from_files(source.require_tokenizer("")).encode(str(argparse.__doc__))
    cuts = [0, 24, 24 + EXACT, 24 + 2 * EXACT, *range(57, 61)]
    calls = [[tokens[first:last]] for first, last in pairwise(cuts)]
    return config, weights, calls, logits_of(exact, calls, 60).log_softmax(-1)


@pytest.mark.real_weights
@pytest.mark.parametrize(
    "build", [*(pytest.param(name, marks=pytest.mark.slow) for name in BUILDS), *EMULATED]
)
@pytest.mark.parametrize(("kind", "most"), [("as stored", 2e-4), ("int8", 2e-3)])
def test_no_build_moves_what_the_real_network_predicts(
    kind: str, most: float, build: str, gguf_file: Path
) -> None:
    """`most`: mean KL in nats."""
    config, weights, calls, expected = real_network(gguf_file)
    if kind != "as stored":
        weights = {
            name: store(torch.from_numpy(scaled.dense(one)), kind if len(one.shape) > 1 else "float32")
            for name, one in weights.items()
        }
    found = logits_of(NativeEngine(library(build), config, weights), calls, 60).log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < most
    sure = expected.exp().amax(-1) > 0.6
    assert sure.sum() > 10
    assert torch.equal(found[sure].argmax(-1), expected[sure].argmax(-1))


def test_the_same_input_gives_the_same_bits() -> None:
    native, _ = engines(config_of("grouped"), "int4", load_build())
    one, two = (logits_of(native, [[ids(300)], [ids(1, 1)]], 320) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_large_cache_takes_memory_as_it_fills() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE

    config = ModelConfig(**ROPE)
    room = 2 * RESERVED_BYTES // (config.num_hidden_layers * config.num_key_value_heads * 64)
    before = resident()
    cache = NativeCache(config, 4, room // 4, np.dtype(np.float16))
    assert cache.keys.nbytes + cache.values.nbytes > RESERVED_BYTES
    for part in (cache.keys, cache.values):  # as the first prompts of four visitors do
        part[:, :, :, 0] = 1
    assert resident() - before < 8 << 20


def test_a_full_cache_and_a_long_context_are_refused() -> None:
    native, _ = engines(config_of("grouped"), "float32", load_build())
    with pytest.raises(InputError, match="do not fit the model's context of 1500"):
        native.allocate(1, 1501)
    with pytest.raises(InputError, match="do not fit a cache of 4"):
        native.forward([ids(5)], native.allocate(1, 4))
    with pytest.raises(IndexError, match="outside the vocabulary"):
        native.forward([[131]], native.allocate(1, 4))


def test_a_forked_process_makes_threads_of_its_own() -> None:
    native, _ = engines(config_of("grouped"), "float32", load_build())
    expected = native.forward([[5]], native.allocate(1, 4))
    child = os.fork()
    if child == 0:
        same = np.array_equal(native.forward([[5]], native.allocate(1, 4)), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(native.forward([[5]], native.allocate(1, 4)), expected)


def source() -> ModelSource:
    config = config_of("grouped")
    state = initialize(config, 0).requires_grad_(False).state_dict()
    return ModelSource(SourceKind.FOLDER, "model", config, weights=StateWeights(state))


def test_without_a_compiled_build_pytorch_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = make_engine(source(), EngineOptions())
    assert isinstance(compiled, NativeEngine)
    assert not compiled.note
    assert make_engine(source(), EngineOptions(kv_cache="int8")).cache_dtype == np.int8
    monkeypatch.setenv(OVERRIDE, "none")
    load_library.cache_clear()
    try:
        fallback = make_engine(source(), EngineOptions())
        assert isinstance(fallback, TorchEngine)
        assert fallback.note == f"slower, using PyTorch: {OVERRIDE}=none"
        with pytest.raises(UsageError, match="native engine cannot run here"):
            make_engine(source(), EngineOptions(engine="native"))
    finally:
        load_library.cache_clear()
    one, two = (logits_of(engine, [[ids(9)]], 9) for engine in (compiled, fallback))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)
    with pytest.raises(UsageError, match="needs the native engine"):
        make_engine(source(), EngineOptions(engine="torch", kv_cache="int8"))
    chosen = make_engine(source(), EngineOptions(engine="torch"))
    assert isinstance(chosen, TorchEngine)
    assert not chosen.note


def test_a_build_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolctl.native.library.INTERFACE", 0)
    assert "python -m smolctl.native.build" in str(load_library.__wrapped__())


def test_dense_weights_can_be_rounded_when_they_are_loaded() -> None:
    engine = make_engine(source(), EngineOptions(dtype="bfloat16"))
    assert engine.name.endswith("bfloat16")


@pytest.mark.parametrize("build", [*BUILDS, *EMULATED])
@pytest.mark.parametrize("factor", [1.0, 1e-5, 1e3])
def test_cached_values_are_rounded_to_the_nearest_float16(build: str, factor: float) -> None:
    native, _ = engines(config_of("grouped"), "int8", build, factor=factor)
    caches = []
    for dtype in (np.float16, np.float32):
        native.cache_dtype = np.dtype(dtype)
        caches.append(native.allocate(1, 16))
        native.forward([ids(16)], caches[-1])
    narrow, exact = caches
    assert np.array_equal(narrow.keys[0], exact.keys[0].astype(np.float16))
    assert np.array_equal(narrow.values[0, ..., :8], exact.values[0, ..., :8].astype(np.float16))


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_no_engine_gets_more_threads_than_there_are_processors(engine: Literal["native", "torch"]) -> None:
    before = torch.get_num_threads()
    made = make_engine(source(), EngineOptions(engine, threads=100_000))
    found = made.threads if isinstance(made, NativeEngine) else torch.get_num_threads()
    torch.set_num_threads(before)
    assert found == usable_cpus()


@given(bits=st.sampled_from([4, 8]), seed=st.integers(0, 999), factor=st.floats(0.3, 3))
def test_keys_and_values_that_may_overflow_float16_are_kept_in_float32(
    bits: int, seed: int, factor: float
) -> None:
    """The scales alone never call a matrix safe that its values do not: around the limit, either way."""
    config = config_of("grouped").model_copy(update={"num_hidden_layers": 1})
    rows = torch.randn(16, 48, generator=torch.Generator().manual_seed(seed))
    norm = torch.rand(48, generator=torch.Generator().manual_seed(seed + 1)) + 0.5
    limit = 65_504 / (2 * 48) ** 0.5
    packed = pack(rows * factor * limit / float((rows * norm).norm(dim=1).max()), bits, 32)
    prefix = "model.layers.0."
    weights: dict[str, Stored] = {f"{prefix}self_attn.{name}_proj.weight": packed for name in "kv"}
    weights[f"{prefix}input_layernorm.weight"] = norm.numpy()
    largest = float((dense(packed) * norm).norm(dim=1).max())
    assert cache_dtype_of(config, weights) == (np.float16 if largest < limit else np.float32)
    assert (dense(packed).abs().numpy() <= 1.001 * packed.largest().repeat(32, axis=1)[:, :48]).all()


def test_the_kind_names_the_most_numerous_weights_first() -> None:
    weights: dict[str, Stored] = {
        "a": np.zeros((2, 2), np.float32),
        "b": pack(torch.randn(8, 64), 4, 32),
        "c": np.zeros(5, np.float32),
    }
    assert kind_of(weights) == "int4 + float32"
