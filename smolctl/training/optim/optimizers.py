"""The optimizer of a run."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from smolctl.config.run import OptimizerConfig
from smolctl.model.network import Transformer
from smolctl.training.optim.muon import MuonAdamW, muon_momentum

TABLES = ("model.embed_tokens.", "model.embed_positions.")


def make_optimizer(
    network: Transformer, config: OptimizerConfig, dtype: torch.dtype | None = None
) -> torch.optim.Optimizer:
    """Fused AdamW, or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay applies to matrices, to tables only if the config says so, and not to norms and biases, which
    have one dimension. Tables with a separate learning rate form one more group. A head that is tied to the
    token table belongs to that group; an untied head has the learning rate of the other matrices.

    Args:
        network: the network to train.
        config: of the optimizer.
        dtype: for Muon's orthogonal factors (`device.muon_dtype`).
    """
    hidden = set(map(id, hidden_matrices(network))) if config.name == "muon" else set()
    rate, decay, multiplier = config.learning_rate, config.weight_decay, config.embedding_lr_multiplier

    def kind(name: str, one: nn.Parameter) -> str:
        is_table = name.startswith(TABLES)
        if is_table and multiplier != 1:
            return "table"
        if one.dim() < 2 or (is_table and not config.decay_embeddings):
            return "undecayed"
        return "hidden" if id(one) in hidden else "decayed"

    of: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, one in network.named_parameters():
        if one.requires_grad:
            of[kind(name, one)].append(one)
    groups: list[dict[str, Any]] = [
        {"params": of["decayed"], "weight_decay": decay},
        {"params": of["undecayed"], "weight_decay": 0.0},
    ]
    if of["table"]:  # a checkpoint of a run without a multiplier has no such group
        own = {"lr": rate * multiplier, "lr_multiplier": multiplier}
        groups.append(
            {"params": of["table"], "weight_decay": decay if config.decay_embeddings else 0.0, **own}
        )
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=config.betas, eps=config.eps, fused=True)
    groups = [{**group, "muon": False} for group in groups]
    return MuonAdamW(
        [{"params": of["hidden"], "weight_decay": decay, "muon": True}, *groups],
        lr=rate,
        betas=config.betas,
        eps=config.eps,
        dtype=dtype,
    )


def hidden_matrices(network: Transformer) -> list[nn.Parameter]:
    """The matrices between the embeddings and the head, which Muon updates."""
    return [
        parameter
        for parameter in network.model.layers.parameters()
        if parameter.requires_grad and parameter.dim() >= 2
    ]


def set_step(optimizer: torch.optim.Optimizer, config: OptimizerConfig, rate: float, place: float) -> None:
    """Set the values of every group that depend on the step: the learning rate, and Muon's momentum.

    Args:
        optimizer: from `make_optimizer`.
        config: with the momentum's warmup as a whole number of steps.
        rate: of the step, before the multiplier for tables.
        place: number of the step in the schedule, from 1.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_multiplier", 1.0)
        if config.name == "muon":
            group["momentum"] = muon_momentum(place, config.momentum_warmup)


def apply_settings(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Apply the config's settings to an optimizer loaded from a checkpoint; its state is kept."""
    for group in optimizer.param_groups:
        is_tables = "lr_multiplier" in group
        decays = all(parameter.dim() >= 2 for parameter in group["params"])  # the others contain norms
        decays = decays and (config.decay_embeddings or not is_tables)
        group["weight_decay"] = config.weight_decay if decays else 0.0
        group["betas"], group["eps"] = config.betas, config.eps
