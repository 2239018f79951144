"""The network's own operations against PyTorch's: the same values, the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smolctl.config import ModelConfig
from smolctl.model import attention, functional, products
from smolctl.model.functional import (
    linear,
    linear_cross_entropy,
    rms_norm,
    rms_norm_linears,
    rotate,
    swiglu,
    tied_embedding,
)
from smolctl.model.network import rotary_table
from smolctl.timing import resident_memory
from tests.support.tiny_models import tiny_network

ROPE = {"position_embedding": "rope", "residual_scale": 1.0}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_gradients(
    one: Callable[..., Tensor], two: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-6
) -> None:
    """Values and gradients of both functions agree on the same inputs, in float32."""
    results = []
    for function in (one, two):
        leaves = [value.float().requires_grad_() for value in inputs]
        out = function(*leaves)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=tolerance, rtol=1e-5)


def test_rms_norm_equals_pytorch() -> None:
    assert_same_gradients(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: F.rms_norm(x, (24,), w, 1e-5),
        draw(2, 5, 24),
        draw(24, seed=1),
    )


@pytest.fixture(params=["wide onednn", "onednn", "default"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The choice of libraries of every kind of processor, whatever processor this is."""
    monkeypatch.setattr(products, "PREFERS_ONEDNN", request.param != "default")
    monkeypatch.setattr(products, "HAS_WIDE_ONEDNN", request.param == "wide onednn")
    monkeypatch.setattr(functional, "SMALLEST_RECOMPUTED", 1)
    return str(request.param)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [3, 40])  # oneDNN takes many rows only
def test_linear_equals_pytorch(rows: int) -> None:
    assert_same_gradients(linear, F.linear, draw(2, rows, 24), draw(7, 24, seed=1), tolerance=1e-4)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [3, 40])
def test_products_after_a_norm_equal_their_definition(rows: int) -> None:
    def joined(*outputs: Tensor) -> Tensor:
        return torch.cat(outputs, -1)

    assert_same_gradients(
        lambda x, norm, *weights: joined(*rms_norm_linears(x, norm, 1e-5, *weights)),
        lambda x, norm, *weights: joined(
            *(F.linear(F.rms_norm(x, (24,), norm, 1e-5), weight) for weight in weights)
        ),
        draw(2, rows, 24),
        draw(24, seed=1),
        *(draw(size, 24, seed=size) for size in (5, 6, 9)),
        tolerance=1e-4,
    )


def test_a_second_backward_pass_over_one_loss_is_refused() -> None:
    hidden, weight = draw(10, 8).float().requires_grad_(), draw(30, 8, seed=1).float().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.zeros(10, dtype=torch.long), 4)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rotation_equals_its_definition() -> None:
    config = ModelConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    table = rotary_table(config, 6, torch.device("cpu"))

    def defined(x: Tensor) -> Tensor:
        cos, sin = table.repeat(1, 1, 1, 2)
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    assert_same_gradients(lambda x: rotate(x, table), defined, draw(2, 6, 2, 8))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_swiglu_equals_its_definition(rows: int, scale: float) -> None:
    def defined(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        inputs = F.rms_norm(x, (24,), norm, 1e-5)
        return x + scale * F.linear(F.silu(F.linear(inputs, gate)) * F.linear(inputs, up), down)

    assert_same_gradients(
        lambda x, norm, *weights: swiglu(x, norm, 1e-5, scale, *weights),
        defined,
        draw(2, rows, 24),
        draw(24, seed=1),
        *(draw(*shape, seed=2) / 5 for shape in ((12, 24), (12, 24), (24, 12))),
        tolerance=1e-5,
    )


@pytest.mark.usefixtures("library")
def test_a_matmul_added_to_a_sum_equals_its_definition() -> None:
    assert_same_gradients(
        lambda x, weight, sum: linear(x, weight, sum),
        lambda x, weight, sum: sum + F.linear(x, weight),
        draw(2, 40, 24),
        draw(7, 24, seed=1),
        draw(2, 40, 7, seed=2),
        tolerance=1e-4,
    )


def test_a_table_used_twice_has_the_sum_of_both_gradients() -> None:
    tokens = torch.tensor([[1, 3, 1], [0, 3, 3]])

    def used(embedded: Tensor, head: Tensor) -> Tensor:
        return torch.tanh(embedded) @ head.mT

    assert_same_gradients(
        lambda table: used(*tied_embedding(tokens, table)),
        lambda table: used(F.embedding(tokens, table), table),
        draw(5, 8),
    )


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("length", [5, 64, 400, 777])
def test_attention_from_matmuls_equals_pytorch(
    heads: tuple[int, int], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "HAS_WIDE_ONEDNN", True)
    H, K = heads
    D, C = 16, 24

    def project(x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (F.linear(x, weight).unflatten(2, (-1, D)) for weight in weights)
        return q, k, v

    def pytorch(x: Tensor, *weights: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in project(x, weights))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    assert_same_gradients(
        lambda x, *weights: attention.causal_attention(x, (H, D), lambda x: project(x, weights), weights),
        pytorch,
        draw(2, length, C) / 5,
        *(draw(count * D, C, seed=count) / 5 for count in (H, K, K)),
        tolerance=2e-4,
    )


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [1, 4, 10, 64, 100])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_chunked_cross_entropy_equals_the_whole_one(rows: int, z_loss: float) -> None:
    targets = torch.randint(0, 30, (70,), generator=torch.Generator().manual_seed(3))

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.mT
        return F.cross_entropy(logits, targets, reduction="sum") + z_loss * logits.logsumexp(1).square().sum()

    assert_same_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, rows, z_loss)[0],
        whole,
        draw(70, 8),
        draw(30, 8, seed=1),
        tolerance=1e-5,
    )


def test_cross_entropy_is_exact_where_a_target_is_all_but_impossible() -> None:
    hidden, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([1]), 1)[0].item() == 400.0


def test_operations_work_under_autocast() -> None:
    network = tiny_network(initializer_range=0.02)
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))
    exact = network.loss(tokens[:, :-1], tokens[:, 1:])
    exact.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network.loss(tokens[:, :-1], tokens[:, 1:])
    mixed.backward()
    assert mixed.item() == pytest.approx(exact.item(), rel=1e-2)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.linalg.vector_norm(parameter.grad - gradients[name]) < 0.05 * torch.linalg.vector_norm(
            gradients[name]
        )


@pytest.mark.parametrize(
    "fields",
    [{}, ROPE, {**ROPE, "qkv_bias": True}, {**ROPE, "use_qk_norm": True}, {"tie_word_embeddings": False}],
    ids=["learned", "rope", "biases", "norms of heads", "untied"],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_network_has_the_same_gradients_on_every_processor(
    fields: dict[str, Any], checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where matmuls are fast, attention is built from them, and their results are recomputed."""
    monkeypatch.setattr(attention, "FEWEST_POSITIONS", 1)
    monkeypatch.setattr(functional, "SMALLEST_RECOMPUTED", 1)
    tokens = torch.randint(0, 64, (2, 65), generator=torch.Generator().manual_seed(0))
    found = []
    for is_wide in (False, True):
        for name in ("PREFERS_ONEDNN", "HAS_WIDE_ONEDNN"):
            monkeypatch.setattr(products, name, is_wide)
        network = tiny_network(initializer_range=0.2, max_position_embeddings=64, **fields).train()
        network.model.checkpoint_activations = checkpointed
        with mock.patch.object(attention, "_attend", wraps=attention._attend) as attend:
            loss = network.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
        assert attend.called == is_wide
        found.append((loss.detach(), {name: p.grad for name, p in network.named_parameters()}))
    torch.testing.assert_close(*found, atol=2e-3, rtol=1e-4)


def test_memory_does_not_grow_with_the_different_numbers_of_tokens_that_count() -> None:
    """Of conversations, a different number of tokens counts in every step."""

    def step(count: int) -> None:
        hidden, weight = draw(count, 64).float().requires_grad_(), draw(1024, 64).float().requires_grad_()
        linear_cross_entropy(hidden, weight, torch.zeros(count, dtype=torch.long), 256)[0].backward()

    step(256)
    if (before := resident_memory()) is None:
        pytest.skip("this system does not report the memory of a process")
    for count in range(33, 257):
        step(count)
    after = resident_memory()
    assert after is not None
    assert after - before < 100e6  # bytes; it was 276 MB when each number was multiplied as it came
