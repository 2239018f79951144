"""A training step in its three parts: forward, backward, optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from smolctl.benchmark.contenders import plain_network
from smolctl.benchmark.work import Job, Lap, Work
from smolctl.training.fit import keep_freed_memory
from smolctl.training.optim.optimizers import make_optimizer

Step = tuple[Callable[[], Tensor], torch.optim.Optimizer, list[nn.Parameter]]
CLIP = 1.0  # norm of the gradient, as `train` clips by default


def training_step(job: Job) -> Work:
    """The step of a contender on one fixed batch.

    The learning rate is zero: all the arithmetic is done, the weights stay as they are, and every repeat
    does the same work and finds the same loss.
    """
    if job.contender.engine == "reference":
        return _reference(job)
    step = _ours(job) if job.contender.engine == "smolctl" else _transformers(job)
    return lambda: _timed(*step)


def _ours(job: Job) -> Step:
    keep_freed_memory()  # as `smolctl train` does
    network = plain_network(job.contender.model).train()
    inputs, targets = batch(job)
    optimizer = make_optimizer(network, job.optimizer.model_copy(update={"learning_rate": 0.0}))
    return lambda: network.loss(inputs, targets) / targets.numel(), optimizer, list(network.parameters())


def _transformers(job: Job) -> Step:
    from smolctl.benchmark.peers import load_transformers

    network = load_transformers(job.contender.model).train()
    inputs, targets = batch(job)
    settings = job.optimizer
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=0.0,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def loss() -> Tensor:
        # With shift_labels the targets are taken as they are: the same tokens as on our side.
        out = network(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False)
        found: Tensor = out.loss
        return found

    return loss, optimizer, list(network.parameters())


def batch(job: Job) -> tuple[Tensor, Tensor]:
    """Tokens (sequences, length) and those that follow them."""
    sizes = job.sizes
    rows = torch.tensor([job.text[at % len(job.text)][: sizes.length + 1] for at in range(sizes.sequences)])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _timed(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> Lap:
    clock = time.perf_counter
    marks = [clock()]
    value = loss()
    marks.append(clock())
    value.backward()
    marks.append(clock())
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    marks.append(clock())
    parts = [after - before for before, after in pairwise(marks)]
    return Lap((marks[-1] - marks[0], *parts), value.detach().view(1))


def _reference(job: Job) -> Work:
    """The loss by way of whole logits, which no contender computes like that."""
    network = plain_network(job.contender.model)
    inputs, targets = batch(job)

    @torch.inference_mode()
    def run() -> Lap:
        return Lap((0.0,), network.token_losses(inputs, targets).mean().view(1))

    return run
