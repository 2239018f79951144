"""Attention that stays within a document."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smolctl.config import ModelConfig
from smolctl.data.batches import sequences_of
from smolctl.evaluation import bits_per_byte
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize

END = 0
FIRST, SECOND = [5, 6, 7, 8, END], [9, 5, 11, 12, 13, END, 14]


def network(position_embedding: str = "rope") -> Transformer:
    config = ModelConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        position_embedding=position_embedding,
        initializer_range=0.3,  # so that attention matters
    )
    return initialize(config, seed=3).eval()


def packed() -> tuple[Tensor, Tensor]:
    tokens = torch.tensor([FIRST + SECOND, SECOND + FIRST])
    ids = sequences_of(F.pad(tokens, (0, 1)), END).documents
    assert ids is not None
    return tokens, ids


def test_an_end_of_text_token_belongs_to_the_document_that_it_ends() -> None:
    _, ids = packed()
    assert ids.tolist() == [[0] * 5 + [1] * 6 + [2], [0] * 6 + [1] * 6]
    assert sequences_of(torch.tensor([FIRST]), None).documents is None


@torch.no_grad()
def test_logits_of_a_packed_document_are_those_of_the_document_alone() -> None:
    model, (tokens, ids) = network(), packed()
    masked, plain = model(tokens, documents=ids), model(tokens)
    alone = model(torch.tensor([SECOND[:6]]))
    torch.testing.assert_close(masked[0, 5:11], alone[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked[0, :5], plain[0, :5], atol=1e-5, rtol=1e-4)
    assert (plain[0, 5:11] - alone[0]).abs().max() > 0.1  # without the mask they differ


@torch.no_grad()
@pytest.mark.parametrize("position_embedding", ["rope", "learned"])
def test_nothing_before_a_document_changes_it(position_embedding: str) -> None:
    model, (tokens, ids) = network(position_embedding), packed()
    other = tokens.clone()
    other[0, :4] = 21
    assert torch.equal(model(tokens, documents=ids)[0, 5:], model(other, documents=ids)[0, 5:])
    assert not torch.equal(model(tokens)[0, 5:], model(other)[0, 5:])


@torch.no_grad()
@pytest.mark.parametrize("position_embedding", ["rope", "learned"])
def test_a_document_is_read_the_same_wherever_it_lies(position_embedding: str) -> None:
    model, (tokens, ids) = network(position_embedding), packed()
    packed_logits = model(tokens, documents=ids)
    torch.testing.assert_close(packed_logits[0, 5:11], packed_logits[1, :6], atol=1e-5, rtol=1e-4)


def plain_varlen(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, _: Tensor, longest: int, __: int, **options: Any
) -> Tensor:
    """What PyTorch documents of its `varlen_attn`, which runs on GPUs only: (N, H, D)."""
    assert options["window_size"] == (-1, 0)  # causal
    assert begins.dtype == torch.int32
    assert longest == begins.diff().max()
    found = []
    for first, last in pairwise(begins.tolist()):
        a, b, c = (part[None, first:last].transpose(1, 2) for part in (q, k, v))  # (1, H or K, t, D)
        shared = options["enable_gqa"]
        found.append(F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=shared))
    return torch.cat(found, dim=2)[0].transpose(0, 1)


@pytest.mark.parametrize("position_embedding", ["rope", "learned"])
def test_the_kernel_of_gpus_is_asked_for_the_same_attention(
    position_embedding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (tokens, ids) = network(position_embedding), packed()
    expected = model(tokens, documents=ids)
    asked = Mock(side_effect=plain_varlen)
    for module in ("network", "block"):
        monkeypatch.setattr(f"smolctl.model.{module}.has_kernels", lambda _x: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", asked)
    torch.testing.assert_close(model(tokens, documents=ids), expected, atol=1e-6, rtol=1e-5)
    assert asked.call_count == len(model.model.layers)


@pytest.mark.parametrize("position_embedding", ["rope", "learned"])
def test_compiled_blocks_on_gpus_give_what_a_mask_gives(
    position_embedding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlexAttention, which GPUs compile; here its own plain implementation computes it."""
    compiled, masked = network(position_embedding).train(), network(position_embedding).train()
    masked.model.masks_documents = True
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr("smolctl.model.network.FLEX_MIN_HEAD_DIM", 8)
    compilations = 0

    def compile_graph(module: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal compilations
        compilations += 1
        return module.forward

    compiled.model.is_compiled = True
    for block in compiled.model.layers:
        block.compile(backend=compile_graph)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 32, (2, 17), generator=generator)
        packed = (torch.rand(2, 16, generator=generator) < 0.2).cumsum(1)
        for documents in (packed, None):
            found = []
            for model in (compiled, masked):
                monkeypatch.setattr(
                    "smolctl.model.network.has_kernels", lambda _x, model=model: model is compiled
                )
                model.zero_grad()
                loss = model.loss(tokens[:, :-1], tokens[:, 1:], documents)
                loss.backward()
                found.append((loss, [parameter.grad for parameter in model.parameters()]))
            torch.testing.assert_close(*found, atol=5e-5, rtol=1e-3)
    assert compilations == 2  # with documents and without, whatever their lengths


@torch.no_grad()
def test_one_document_is_attended_to_as_without_a_mask() -> None:
    model, tokens = network(), torch.tensor([FIRST[:4] * 3])
    masked = model(tokens[:, :-1], documents=sequences_of(tokens, END).documents)
    torch.testing.assert_close(masked, model(tokens[:, :-1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_documents_read_one_by_one_give_what_a_mask_gives(checkpoints: bool) -> None:
    model, (tokens, ids) = network(), packed()
    model.train().model.checkpoint_activations = checkpoints
    found = []
    for with_mask in (True, False):
        model.model.masks_documents = with_mask
        model.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], documents=ids[:, :-1])
        loss.backward()
        found.append((loss, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_gradients_flow_within_documents_only() -> None:
    model, (tokens, ids) = network(), packed()
    inside: list[Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, _i, output: inside.append(output))
    logits = model(tokens, documents=ids)
    (gradient,) = torch.autograd.grad(logits[0, 10].sum(), inside)  # the second document's last token
    reached = gradient[0].abs().sum(-1) > 0
    assert reached.tolist() == [False] * 5 + [True] * 6 + [False]
    model.loss(tokens[:, :-1], tokens[:, 1:], documents=ids[:, :-1]).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_losses_of_training_and_evaluation_agree_with_the_mask() -> None:
    model, (tokens, ids) = network(), packed()
    parts, inside = (tokens[:, :-1], tokens[:, 1:]), ids[:, :-1]
    total = model.token_losses(*parts, inside).sum()
    assert model.loss(*parts, documents=inside).item() == pytest.approx(total.item(), rel=1e-5)
    sizes = torch.ones(32, dtype=torch.long)
    masked = bits_per_byte(model, [tokens], sizes, END)
    assert masked.loss == pytest.approx(total.item() / 22, rel=1e-5)
    assert masked.loss != pytest.approx(bits_per_byte(model, [tokens], sizes).loss, rel=1e-3)
