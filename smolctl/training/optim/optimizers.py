"""The optimizer of a run."""

from __future__ import annotations

import torch
from torch import nn

from smolctl.config.run import OptimizerConfig
from smolctl.model.network import Transformer
from smolctl.training.optim.muon import MuonAdamW, muon_momentum

TABLES = ("model.embed_tokens.", "model.embed_positions.")


def make_optimizer(network: Transformer, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW in its fused form, or Muon for the blocks' matrices and AdamW for the rest.

    Matrices decay, tables only where the config says so; norms and biases, which have one dimension, do not.
    """
    named = [(name, one) for name, one in network.named_parameters() if one.requires_grad]
    matrices = [
        one
        for name, one in named
        if one.dim() >= 2 and (config.decay_embeddings or not name.startswith(TABLES))
    ]
    decaying = set(map(id, matrices))
    others = {"params": [one for _, one in named if id(one) not in decaying], "weight_decay": 0.0}
    if config.name == "adamw":
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, others]
        return torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
        )
    hidden = hidden_matrices(network)
    known = set(map(id, hidden))
    tables = [parameter for parameter in matrices if id(parameter) not in known]
    return MuonAdamW(
        [
            {"params": hidden, "weight_decay": config.weight_decay, "muon": True},
            {"params": tables, "weight_decay": config.weight_decay, "muon": False},
            {**others, "muon": False},
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
    )


def hidden_matrices(network: Transformer) -> list[nn.Parameter]:
    """The matrices between the embeddings and the head, which Muon steps."""
    return [
        parameter
        for parameter in network.model.layers.parameters()
        if parameter.requires_grad and parameter.dim() >= 2
    ]


def set_step(optimizer: torch.optim.Optimizer, config: OptimizerConfig, rate: float, place: float) -> None:
    """Give every group what a step's number decides: the learning rate, and Muon's momentum.

    Args:
        optimizer: from `make_optimizer`.
        config: with a whole number of steps for the momentum's warmup.
        rate: of the step.
        place: of the step in the schedule, from 1.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
        if config.name == "muon":
            group["momentum"] = muon_momentum(place, config.momentum_warmup)


def apply_settings(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Give an optimizer that was loaded from a checkpoint the config's settings; its state stays."""
    for group in optimizer.param_groups:
        decays = all(parameter.dim() >= 2 for parameter in group["params"])  # the others hold norms
        group["weight_decay"] = config.weight_decay if decays else 0.0
        group["betas"], group["eps"] = config.betas, config.eps
