"""Muon for the matrices between the embeddings, and AdamW for everything else, as one optimizer.

Muon (Jordan et al., 2024) keeps a momentum of each matrix's gradient, and the update is the nearest
orthogonal matrix, so that every direction of the gradient gets the same length. A Newton-Schulz iteration
computes that matrix using only matmuls.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from smolctl.model.products import multiplies_fast, product

# Coefficients of five quintic iterations, chosen by Jordan for the steepest slope at 0; the resulting
# singular values lie between 0.7 and 1.2, which trains as well as exactly 1.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5

# The entries of an orthogonal (m, n) matrix have a root mean square of 1/√max(m, n). Multiplied by
# 0.2·√max(m, n), it has the usual size of AdamW's updates (Liu et al., "Muon is scalable for LLM training",
# 2025), so both parts can share a learning rate and a weight decay.
ADAMW_RMS = 0.2


# Rows of a matrix that is multiplied alone (`products.product`); smaller ones are faster in a batch.
SMALLEST_ALONE = 256

# At the start of the momentum's warmup, as in modded-nanogpt and nanochat, and after it, as in Jordan's Muon.
MOMENTUM = 0.85, 0.95


def muon_momentum(place: float, warmup: float) -> float:
    """Muon's momentum at a step of the schedule, from 1: it rises linearly for `warmup` steps."""
    first, last = MOMENTUM
    return first + (last - first) * min(1.0, place / warmup) if warmup else last


def orthogonalize(
    matrices: Tensor,
    coefficients: Sequence[tuple[float, float, float]] = NEWTON_SCHULZ,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The nearly orthogonal factor of each matrix of (N, rows, columns), in the same shape.

    Args:
        matrices: to orthogonalize.
        coefficients: of each iteration.
        dtype: to compute in; None: bfloat16 on a GPU, as the authors do, and float32 on a CPU, because most
            CPUs emulate bfloat16.
    """
    x = matrices.to(dtype or (torch.bfloat16 if matrices.is_cuda else torch.float32))
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # the matmuls have the size of the smaller side
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    if multiplies_fast(x) and x.shape[-2] >= SMALLEST_ALONE:
        x = torch.stack([_iterated(one, coefficients) for one in x])
    else:
        for a, b, c in coefficients:
            gram = x @ x.mT  # (N, small, small)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def _iterated(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """The iterations of `orthogonalize` for one matrix (small, large), with `products.product`."""
    for a, b, c in coefficients:
        gram = product(x, x)  # (small, small), symmetric
        polynomial = product(gram, gram).mul_(c).add_(gram, alpha=b)
        x = product(polynomial, x.mT).add_(x, alpha=a)
    return x


def by_shape(parameters: Iterable[nn.Parameter]) -> dict[torch.Size, list[nn.Parameter]]:
    """Group parameters by shape: their matmuls run as one batch."""
    groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[parameter.shape].append(parameter)
    return groups


class MuonAdamW(Optimizer):
    """Parameter groups with `muon: True` are updated by Muon, the others by fused AdamW.

    One object with one flat state: its `state_dict` is saved and loaded like that of any optimizer.

    Args:
        groups: of parameters, each with `muon` and `weight_decay`; groups for Muon contain only matrices.
        lr: learning rate of both.
        betas, eps: AdamW's.
        momentum: Muon's, in Nesterov's form.
        dtype: for computing orthogonal factors, see `orthogonalize`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = MOMENTUM[1],
        dtype: torch.dtype | None = None,
    ) -> None:
        # "fused" makes `load_state_dict` expect AdamW's step counters on the parameters' device.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "fused": True}
        super().__init__(groups, defaults)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                self._muon_step(parameters, group)
            else:
                self._adamw_step(parameters, group)
        return loss

    def _muon_step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for shape, members in by_shape(parameters).items():
            directions = []
            for parameter in members:
                assert parameter.grad is not None
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                directions.append(parameter.grad.lerp(buffer, group["momentum"]))
            rate = group["lr"] * ADAMW_RMS * math.sqrt(max(shape))
            updates = orthogonalize(torch.stack(directions), dtype=self._dtype)
            for parameter, update in zip(members, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _adamw_step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            list(parameters),
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
