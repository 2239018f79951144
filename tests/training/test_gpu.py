"""What only a GPU computes: these run where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from smolctl.model.network import Transformer
from smolctl.model.weights import initialize
from smolctl.runs.folder import RunFolder
from smolctl.sources import open_source
from smolctl.training.graph import GradientGraph
from tests.support.processes import Smolctl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def nano() -> Transformer:
    return initialize(open_source("nano").require_config(), seed=0).cuda().train()


def loss_of(network: Transformer, rows: Tensor, documents: Tensor | None = None) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        loss = network.loss(rows[:, :-1], rows[:, 1:], documents) / rows[:, 1:].numel()
    loss.backward()
    return loss.detach()


def gradients_of(network: Transformer) -> Tensor:
    return torch.cat([one.grad.flatten() for one in network.parameters() if one.grad is not None])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_gives_the_gradient_of_each_batch_alone(compiled: bool) -> None:
    network, plain = nano(), nano()
    if compiled:
        network.compile_blocks()
        plain.compile_blocks()
    batches = [torch.randint(0, 4096, (4, 129), device="cuda") for _ in range(3)]
    graph = GradientGraph(network, lambda rows: loss_of(network, rows), batches[0])
    for rows in batches:
        loss = graph(rows).clone()
        plain.zero_grad()
        torch.testing.assert_close(loss, loss_of(plain, rows), rtol=1e-3, atol=0)
        torch.testing.assert_close(gradients_of(network), gradients_of(plain), rtol=2e-2, atol=1e-4)
        network.zero_grad(set_to_none=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_blocks_have_the_gradients_of_uncompiled_ones(dtype: torch.dtype) -> None:
    """A tensor that a compiled function wrote in place once had none, without an error."""
    plain, compiled = nano(), nano()
    compiled.compile_blocks()
    rows = torch.randint(0, 4096, (4, 129), device="cuda")
    for network in (plain, compiled):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            network.loss(rows[:, :-1], rows[:, 1:]).backward()
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (other.grad - one.grad).norm() < 0.05 * one.grad.norm(), name


def test_a_graph_keeps_what_its_function_reads() -> None:
    network = nano()

    def graph_of(factor: Tensor) -> GradientGraph[Tensor]:
        return GradientGraph(network, lambda rows: loss_of(network, rows) * factor, rows)

    rows = torch.randint(0, 4096, (4, 129), device="cuda")
    graph = graph_of(torch.full((), 2.0, device="cuda"))
    before = graph(rows).item()
    others = [torch.full((), 3.0, device="cuda") for _ in range(1000)]
    assert graph(rows).item() == before
    assert len(others) == 1000


def test_a_compiled_run_learns_as_an_eager_one(smolctl: Smolctl, tmp_path: Path) -> None:
    """The graph of the whole step, as `train` takes it, and `resume --verify` of both."""
    losses = []
    for compiled in ("true", "false"):
        run = tmp_path / compiled
        options = ("--set", f"train.compile={compiled}", "--set", "checkpoint.every=4")
        assert smolctl("train", "nano", "--steps", 8, "--out", run, *options).code == 0
        assert smolctl("resume", run, "--verify").code == 0
        records = RunFolder(run).metrics()
        losses.append([record["loss"] for record in records if record["event"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_kernels_attend_within_documents_as_a_mask_does() -> None:
    network = nano()
    rows = torch.randint(0, 4096, (4, 129), device="cuda")
    owners = (torch.rand(4, 128, device="cuda") < 0.05).cumsum(1)
    found = []
    for network.model.masks_documents in (True, False):
        network.zero_grad()
        found.append((loss_of(network, rows, owners), gradients_of(network)))
    network.compile_blocks()
    graph = GradientGraph(network, lambda rows: loss_of(network, rows, owners), rows)
    found.append((graph(rows), gradients_of(network)))
    (masked, expected), *others = found
    for loss, gradient in others:
        torch.testing.assert_close(loss, masked, rtol=1e-3, atol=0)
        assert (gradient - expected).norm() < 0.05 * expected.norm()
