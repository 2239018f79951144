"""Counts and costs against networks that really exist, on no memory: PyTorch's meta device."""

from __future__ import annotations

import re
import subprocess
import sys
from math import prod
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from smolctl.arithmetic import (
    LOSS_CHUNK_ROWS,
    TRAINING_DTYPES,
    activation_values_per_token,
    count_parameters,
    count_rows,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    parameter_rows,
    run_memory,
    tensor_rows,
    training_flops_per_token,
)
from smolctl.config import ModelConfig, RunConfig, load_run_config
from smolctl.inspection import ModuleNode, module_tree
from smolctl.model import functional, network, products
from smolctl.model.cache import KVCache
from smolctl.model.network import Transformer


@st.composite
def configs(draw: st.DrawFn, position: str | None = None) -> ModelConfig:
    """Shapes of every kind: tied and not, grouped heads, a head_dim that is not hidden / heads."""
    key_value_heads = draw(st.integers(1, 3))
    heads = key_value_heads * draw(st.integers(1, 4))
    position = position or draw(st.sampled_from(["rope", "learned"]))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 70)),
        hidden_size=heads * draw(st.integers(1, 8)),  # transformers wants a multiple
        intermediate_size=draw(st.integers(1, 50)),
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=2 * draw(st.integers(1, 8)),
        max_position_embeddings=draw(st.integers(1, 30)),
        position_embedding=position,
        residual_scale=1.0 if position == "rope" else 0.5,
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=None,
        eos_token_id=None,
    )


def recipe(config: ModelConfig) -> RunConfig:
    return RunConfig().model_copy(update={"model": config})


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize(
    ("preset", "unique", "naive", "non_embedding"),
    [
        ("smollm2-135m", 135_104_832, 163_416_384, 106_203_456),
        ("smollm2-135m-hub", 134_515_008, 162_826_560, 106_203_456),
        ("smollm2-135m-pretrain", 134_515_008, 162_826_560, 106_203_456),
    ],
)
def test_the_three_totals_of_the_presets(preset: str, unique: int, naive: int, non_embedding: int) -> None:
    count = count_parameters(load_run_config(preset).model)
    assert (count.unique, count.naive, count.non_embedding) == (unique, naive, non_embedding)


@given(configs())
def test_names_shapes_and_counts_equal_the_network(config: ModelConfig) -> None:
    rows = parameter_rows(config)
    state = {name: tuple(tensor.shape) for name, tensor in on_meta(config).state_dict().items()}
    assert {f"{row.module}.weight": row.shape for row in rows if not row.tied} == state
    assert count_rows(rows).unique == sum(prod(shape) for shape in state.values())


@pytest.mark.slow
def test_counts_equal_llama_for_causal_lm() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    @given(configs(position="rope"))
    def check(config: ModelConfig) -> None:
        fields = config.model_dump(exclude={"position_embedding", "residual_scale", "rope_theta"})
        with torch.device("meta"):
            llama = LlamaForCausalLM(LlamaConfig(**fields))
        llama.tie_weights()
        count = count_parameters(config)
        assert count.unique == sum(p.numel() for p in llama.parameters())
        assert count.naive == sum(p.numel() for _, p in llama.named_parameters(remove_duplicate=False))
        names = {f"{row.module}.weight": row.shape for row in count.rows}
        assert names == {n: tuple(p.shape) for n, p in llama.named_parameters(remove_duplicate=False)}

    check()


@given(configs(), st.integers(1, 6))
def test_tree_adds_up_at_every_depth(config: ModelConfig, depth: int) -> None:
    count = count_parameters(config)
    nodes = cut(module_tree(count.rows, "num_hidden_layers"), depth)
    assert sum(node.parameters for node in nodes if not node.tied) == count.unique
    assert sum(node.parameters for node in nodes) == count.naive


@given(configs(), st.integers(2, 6))
def test_every_formula_gives_its_number(config: ModelConfig, depth: int) -> None:
    for node in cut(module_tree(parameter_rows(config), "num_hidden_layers"), depth):
        assert evaluate(node.formula, config.model_dump()) == node.parameters, node.module
        if node.shape is not None:
            assert prod(node.shape) * node.copies == node.parameters, node.module


@given(configs(), st.integers(1, 5), st.integers(1, 400), st.sampled_from(sorted(TRAINING_DTYPES)))
def test_every_memory_formula_gives_its_number(
    config: ModelConfig, batch_size: int, sequence_length: int, dtype: str
) -> None:
    memory = run_memory(recipe(config), batch_size, sequence_length, dtype)
    for part, formula in memory.formulas.items():
        numbers = re.sub(r"bytes|tokens|values", "", formula)
        assert evaluate(numbers, {}) == getattr(memory, part), part
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits)
    assert memory.total == sum(parts)


def cut(tree: tuple[ModuleNode, ...], depth: int) -> list[ModuleNode]:
    return [node for top in tree for node in top.at_depth(depth)]


def evaluate(formula: str, names: dict[str, object]) -> int:
    """The value of "a × 1,024 + b"."""
    return eval(formula.replace(",", "").replace("×", "*"), {}, names)


def test_layers_that_differ_are_counted_apart() -> None:
    shapes = [
        ("model.layers.0.mlp.up.weight", (4, 2)),
        ("model.layers.1.mlp.up.weight", (4, 2)),
        ("model.layers.2.mlp.experts.0.up.weight", (3, 2)),
        ("model.layers.2.mlp.experts.1.up.weight", (3, 2)),
        ("model.layers.2.router.weight", (2, 2)),
        ("model.layers.2.router.bias", (2,)),
        ("model.layers.3.mlp.up.weight", (4, 2)),
    ]
    nodes = cut(module_tree(tensor_rows(shapes)), 9)
    assert {node.module: (node.copies, node.parameters) for node in nodes} == {
        "model.layers.0-1,3.mlp.up": (3, 24),
        "model.layers.2.mlp.experts.*.up": (2, 12),
        "model.layers.2.router.weight": (1, 4),
        "model.layers.2.router.bias": (1, 2),
    }
    assert all(evaluate(node.formula, {}) == node.parameters for node in nodes)


@given(configs(), st.integers(1, 3))
def test_kv_cache_bytes_equal_the_cache_that_is_allocated(config: ModelConfig, batch: int) -> None:
    capacity = config.max_position_embeddings
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        cache = KVCache.allocate(config, batch, capacity, dtype, torch.device("cpu"))
        held = cache.keys.nbytes + cache.values.nbytes
        assert held == batch * capacity * kv_cache_bytes_per_token(config, name)


@given(configs(), st.integers(1, 3))
def test_matrix_flops_equal_what_pytorch_counts(config: ModelConfig, batch: int) -> None:
    tokens = torch.zeros(batch, config.max_position_embeddings, dtype=torch.long)
    with (
        mock.patch.object(products, "PREFERS_ONEDNN", False),  # whose operations PyTorch does not count
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        Transformer(config)(tokens)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert counted == tokens.numel() * forward_flops_per_token(config, context=0)


def test_attention_flops_grow_with_the_context_and_training_costs_three_forwards() -> None:
    config = load_run_config("smollm2-135m-hub").model
    # Scores and values: two products of head_dim, over half the context on average, two FLOPs each.
    per_position = 2 * 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    growth = forward_flops_per_token(config, 2_048) - forward_flops_per_token(config, 1_024)
    assert growth == per_position * 1_024 // 2
    assert training_flops_per_token(config, 1_024) == 3 * forward_flops_per_token(config, 1_024)


ROPE = {"position_embedding": "rope", "residual_scale": 1.0}


@pytest.mark.parametrize(
    "fields",
    [{"position_embedding": "learned"}, ROPE, {**ROPE, "qkv_bias": True}, {**ROPE, "use_qk_norm": True}],
    ids=["learned", "rope", "biases", "norms of heads"],
)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_equal_what_autograd_keeps(
    fields: dict[str, Any], layers: int, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up are computed again where that is cheap, and then not kept."""
    monkeypatch.setattr(products, "HAS_WIDE_ONEDNN", recomputed)
    monkeypatch.setattr(functional, "SMALLEST_RECOMPUTED", 1)
    config = ModelConfig(
        vocab_size=50,
        hidden_size=60,
        intermediate_size=170,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=14,
        max_position_embeddings=64,
        **fields,
    )
    model = Transformer(config)
    tokens = torch.zeros(2, 32, dtype=torch.long)
    model.model(tokens)  # makes the rotary table, which the network keeps
    tables = [] if model.model._rotary is None else [model.model._rotary]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *tables)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(tokens)
    values = sum(tensor.untyped_storage().nbytes() // 4 for tensor in kept.values())
    # The chunked loss holds the hidden states and their gradient, which it computes at once.
    estimate = activation_values_per_token(config, recomputed=recomputed)
    assert values + 2 * hidden.numel() == tokens.numel() * estimate


def test_memory_assumes_the_chunk_that_the_network_uses() -> None:
    assert vars(network)["LOSS_CHUNK_ROWS"] == LOSS_CHUNK_ROWS


def test_dtype_halves_what_is_stored_in_it() -> None:
    config = load_run_config("smollm2-135m").model
    full, half = (run_memory(recipe(config), 2, 1_024, dtype) for dtype in ("float32", "bfloat16"))
    mixed = run_memory(recipe(config), 2, 1_024, "bf16-mixed")
    assert half.weights * 2 == full.weights == mixed.weights
    assert half.activations * 2 == full.activations == mixed.activations * 2
    assert half.logits == 2 * full.logits  # the loss computes in float32, on a copy


PEAK = """
import re, sys, torch
from pathlib import Path
from smolctl.config import ModelConfig
from smolctl.model.weights import initialize

def peak():
    # Not ru_maxrss: that begins with the peak of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

config = ModelConfig.model_validate_json(sys.argv[1])
tokens = torch.zeros(4, 513, dtype=torch.long)
before = peak()
network = initialize(config, seed=0)
optimizer = torch.optim.AdamW(network.parameters(), fused=True)
for _ in range(2):
    optimizer.zero_grad()
    network.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is counted in kilobytes on Linux only")
@pytest.mark.parametrize("tied", [True, False])
def test_memory_estimate_is_near_the_measured_peak(tied: bool) -> None:
    config = ModelConfig(num_hidden_layers=3, tie_word_embeddings=tied)
    command = [sys.executable, "-c", PEAK, config.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run_memory(recipe(config), 4, 512).total == pytest.approx(int(done.stdout), rel=0.2)
