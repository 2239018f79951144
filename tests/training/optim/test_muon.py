"""Muon: orthogonal steps for the blocks' matrices, AdamW's for the rest, and a state that loads exactly."""

from __future__ import annotations

import copy

import pytest
import torch

from smolctl.config import load_run_config
from smolctl.config.run import OptimizerConfig
from smolctl.model import products
from smolctl.model.network import Transformer
from smolctl.training.device import muon_dtype
from smolctl.training.optim import muon
from smolctl.training.optim.muon import orthogonalize
from smolctl.training.optim.optimizers import make_optimizer
from tests.support.tiny_models import tiny_network

MUON = OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.0)


@pytest.fixture
def network() -> Transformer:
    return tiny_network(initializer_range=0.02)


def take_step(network: Transformer, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(seed))
    network.loss(tokens[:, :-1], tokens[:, 1:]).div(32).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 24), (2, 24, 8), (2, 40, 64), (2, 64, 40)])
@pytest.mark.parametrize("is_wide", [False, True])
def test_orthogonalized_matrices_have_singular_values_near_one(
    shape: tuple[int, ...], is_wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFERS_ONEDNN", "HAS_WIDE_ONEDNN"):  # the choice for every processor
        monkeypatch.setattr(products, name, is_wide)
    monkeypatch.setattr(muon, "SMALLEST_ALONE", 8)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.3
    assert values.max() < 1.3
    # The singular vectors stay: U Vᵀ of the input and of the output agree.
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ orthogonalize(matrices) @ v.mT
    assert torch.allclose(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), atol=1e-4)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bfloat16_runs_compute_orthogonal_factors_in_it_where_the_cpu_has_it(
    network: Transformer, has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bfloat16})
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        dtype = muon_dtype(load_run_config("nano", [f"train.precision={precision}"]), torch.device("cpu"))
        trained = copy.deepcopy(network)
        take_step(trained, make_optimizer(trained, MUON, dtype), 0)
        name = "model.layers.0.mlp.down_proj.weight"
        found[precision] = (trained.get_parameter(name) - network.get_parameter(name)).detach()
    apart = (found["bf16-mixed"] - found["32-true"]).norm() / found["32-true"].norm()
    assert 1e-3 < apart < 0.05 if has_bfloat16 else apart == 0


def test_muon_steps_the_matrices_of_the_blocks_and_adamw_the_rest(network: Transformer) -> None:
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = make_optimizer(network, MUON)
    take_step(network, optimizer, 0)
    for name, parameter in network.named_parameters():
        step = parameter.detach() - before[name]
        if ".layers." in name and parameter.dim() == 2:
            assert optimizer.state[parameter].keys() == {"momentum_buffer"}
            # The root of the mean square is AdamW's, 0.2 × lr, whatever the gradient's size.
            assert step.square().mean().sqrt().item() == pytest.approx(0.2e-2, rel=0.35)
        else:
            assert optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}
            # AdamW's first step is lr for every entry with a gradient.
            assert step.abs().max().item() == pytest.approx(1e-2, rel=1e-3)


def test_adamw_part_equals_torch_adamw(network: Transformer) -> None:
    other = copy.deepcopy(network)
    muon, adamw = (
        make_optimizer(network, MUON),
        make_optimizer(other, MUON.model_copy(update={"name": "adamw"})),
    )
    for name, parameter in (*network.named_parameters(), *other.named_parameters()):
        parameter.requires_grad_(".layers." not in name)  # with frozen blocks both see the same gradients
    for seed in range(3):
        take_step(network, muon, seed)
        take_step(other, adamw, seed)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_state_saved_and_loaded_goes_on_bit_for_bit(network: Transformer) -> None:
    optimizer = make_optimizer(network, MUON)
    for seed in range(3):
        take_step(network, optimizer, seed)
    twin = copy.deepcopy(network)
    resumed = make_optimizer(twin, MUON)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        take_step(network, optimizer, seed)
        take_step(twin, resumed, seed)
    for one, two in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_rows_scaled_in_the_gradient_do_not_change_the_size_of_the_step() -> None:
    gradient = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(orthogonalize(gradient), orthogonalize(1e4 * gradient), atol=1e-3)
