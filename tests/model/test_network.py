"""The network: equal to transformers where it claims to be Llama, and to itself however it is run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from smolctl.arithmetic import parameter_rows
from smolctl.config import ModelConfig
from smolctl.errors import InputError
from smolctl.model.cache import KVCache
from smolctl.model.network import Transformer
from smolctl.model.weights import from_state, initialize

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large, so that a mistake shows in the logits
}
LLAMA = {**TINY, "position_embedding": "rope", "residual_scale": 1.0, "rope_theta": 5000.0}


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_logits_equal_transformers(tied: bool, head_dim: int) -> None:
    config = ModelConfig(**LLAMA, tie_word_embeddings=tied, head_dim=head_dim)
    network = initialize(config, seed=1).eval()
    reference = LlamaForCausalLM(
        LlamaConfig(
            **TINY,
            head_dim=head_dim,
            tie_word_embeddings=tied,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        )
    ).eval()
    missing, unexpected = reference.load_state_dict(network.state_dict(), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if tied else [])
    reference.tie_weights()
    ids = tokens(2, 40)
    with torch.inference_mode():
        torch.testing.assert_close(network(ids), reference(ids).logits, rtol=1e-5, atol=1e-5)


def _by_hand(network: Transformer, ids: Tensor) -> Tensor:
    """The learned-position variant written out with nothing but matrix products and a softmax."""
    config, state = network.config, network.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * state[name]

    T = ids.shape[0]
    x = state["model.embed_tokens.weight"][ids] + state["model.embed_positions.weight"][:T]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        y = norm(x, name + "input_layernorm.weight")
        q, k, v = (y @ state[f"{name}self_attn.{p}_proj.weight"].T for p in "qkv")
        group = config.num_attention_heads // config.num_key_value_heads
        heads = []
        for head in range(config.num_attention_heads):
            mine = slice(head * config.head_dim, (head + 1) * config.head_dim)
            shared = slice(head // group * config.head_dim, (head // group + 1) * config.head_dim)
            scores = q[:, mine] @ k[:, shared].T / math.sqrt(config.head_dim)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, shared])
        x = x + config.residual_scale * torch.cat(heads, -1) @ state[name + "self_attn.o_proj.weight"].T
        y = norm(x, name + "post_attention_layernorm.weight")
        gate, up = (y @ state[f"{name}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + config.residual_scale * (F.silu(gate) * up) @ state[name + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ state["model.embed_tokens.weight"].T


def test_learned_position_variant_equals_its_definition() -> None:
    network = initialize(ModelConfig(**TINY), seed=2).eval()
    ids = tokens(1, 33)
    with torch.inference_mode():
        torch.testing.assert_close(network(ids)[0], _by_hand(network, ids[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [TINY, LLAMA], ids=["learned", "rope"])
@pytest.mark.parametrize("cuts", [(10, 1, 1, 1, 7), (1,) * 20, (20,), (7, 13)])
def test_cached_equals_uncached(fields: dict[str, int], cuts: tuple[int, ...]) -> None:
    config = ModelConfig(**fields)
    network = initialize(config, seed=3).eval()
    ids = tokens(2, 20)
    with torch.inference_mode():
        cache = KVCache.allocate(config, 2, 20, torch.float32, torch.device("cpu"))
        cached = torch.cat([network(part, cache) for part in ids.split(list(cuts), dim=1)], dim=1)
        torch.testing.assert_close(cached, network(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_and_its_gradients_equal_the_plain_ones(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolctl.model.network.LOSS_CHUNK_ROWS", 16)  # several chunks, the last one short
    network = initialize(ModelConfig(**LLAMA, tie_word_embeddings=tied), seed=4)
    ids = tokens(3, 24)
    inputs, targets = ids[:, :-1], ids[:, 1:]

    loss = network.loss(inputs, targets)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    plain = F.cross_entropy(network(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    plain.backward()

    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(network.token_losses(inputs, targets).sum(), plain)
    assert gradients.keys() == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [TINY, LLAMA, {**LLAMA, "tie_word_embeddings": False, "head_dim": 10}])
def test_every_tensor_is_the_one_that_the_arithmetic_names(fields: dict[str, int]) -> None:
    config = ModelConfig(**fields)
    expected = {f"{row.module}.weight": row.shape for row in parameter_rows(config) if not row.tied}
    assert {name: tuple(t.shape) for name, t in Transformer(config).state_dict().items()} == expected


def test_initial_weights_are_a_function_of_config_and_seed() -> None:
    config = ModelConfig(**TINY)
    one, same, other = (initialize(config, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    wide = initialize(ModelConfig(**{**TINY, "hidden_size": 480, "head_dim": 8}), 0).state_dict()
    std = TINY["initializer_range"]
    assert wide["model.layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(std, rel=0.05)
    assert wide["model.layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(std / 6**0.5, rel=0.05)


def test_weights_that_do_not_fit_are_named() -> None:
    config = ModelConfig(**LLAMA)
    state = initialize(config, 0).state_dict()
    state["model.norm.weight"] = torch.ones(7)
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
    with pytest.raises(InputError) as error:
        from_state(config, state, "file")
    for part in (
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight is [7], the config says [48]",
    ):
        assert part in error.value.message


def test_tensors_that_follow_from_the_config_are_left_out() -> None:
    config = ModelConfig(**LLAMA)
    state = initialize(config, 0).state_dict()
    old = {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    assert from_state(config, old, "file").state_dict().keys() == state.keys()


def test_a_tied_head_is_accepted_only_when_it_is_the_table() -> None:
    config = ModelConfig(**LLAMA)
    state = initialize(config, 0).state_dict()
    same = {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}
    ids = tokens(1, 5)
    with torch.inference_mode():
        assert torch.equal(from_state(config, same, "file")(ids), from_state(config, state, "file")(ids))
    with pytest.raises(InputError, match="ties lm_head"):
        from_state(config, {**same, "lm_head.weight": same["lm_head.weight"] + 1}, "file")


def test_context_is_a_limit_with_a_message() -> None:
    with pytest.raises(InputError, match="context of 64"):
        KVCache.allocate(ModelConfig(**TINY), 1, 65, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointed_activations_change_no_bit(dropout: float) -> None:
    config = ModelConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=dropout,
    )
    tokens = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointed in (False, True):
        network = initialize(config, 0).train()
        network.model.checkpoint_activations = checkpointed
        torch.manual_seed(1)
        network.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
