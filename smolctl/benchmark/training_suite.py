"""The suite train: the time of a training step and of its forward pass, backward pass and optimizer step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from smolctl.benchmark.engines import plain_network
from smolctl.benchmark.peers import load_transformers
from smolctl.benchmark.workload import Measurement, Run, Workload
from smolctl.model.network import Transformer
from smolctl.sources import open_source
from smolctl.timing import peak_memory, synchronized_time
from smolctl.training.optim.optimizers import make_optimizer
from smolctl.training.process import keep_freed_memory

Loss = Callable[[Tensor, Tensor], Tensor]  # mean over tokens (B, T) and their next tokens
CLIP = 1.0  # norm of the gradient, the default of `train`
CPU = torch.device("cpu")


@dataclass(frozen=True)
class TrainingStep:
    """A training step on a fixed batch; each call takes the step.

    The times are those of the whole step and of its three parts. On a GPU only the whole step waits for the
    device; the times of the parts are those of launching kernels.
    """

    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    device: torch.device = CPU
    bfloat16: bool = False  # whether autocast uses it

    def __call__(self) -> Measurement:
        marks = [synchronized_time(self.device)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = self.loss()
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        groups = self.optimizer.param_groups
        torch.nn.utils.clip_grad_norm_([one for group in groups for one in group["params"]], CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(synchronized_time(self.device))
        parts = [after - before for before, after in pairwise(marks)]
        output = loss.detach().cpu().view(1)
        return Measurement((marks[-1] - marks[0], *parts), output, peak_bytes=peak_memory(self.device))


def open_smolctl(model: str) -> tuple[Transformer, Loss]:
    """The network and the loss of `smolctl train`."""
    keep_freed_memory()
    network = plain_network(model).train()
    return network, lambda inputs, targets: network.loss(inputs, targets) / targets.numel()


def open_transformers(model: str) -> tuple[nn.Module, Loss]:
    """A model of transformers with its own loss, as its Trainer uses it."""
    network = load_transformers(model, open_source(model).require_config()).train()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        # With shift_labels the targets are used without another shift: the same tokens as for smolctl.
        out = network(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False)
        found: Tensor = out.loss
        return found

    return network, loss


def train(workload: Workload) -> Run:
    """The training step of an engine.

    The learning rate is zero, so all the arithmetic is done but the weights do not change, and every run does
    the same work and has the same loss.
    """
    inputs, targets = batch(workload)
    model = workload.engine.model
    if workload.engine.engine == "reference":  # from complete logits, which no engine computes for its loss
        with torch.inference_mode():
            losses = plain_network(model).token_losses(inputs, targets)
        return lambda: Measurement((0.0,), losses.mean().view(1))
    settings = workload.optimizer.model_copy(update={"learning_rate": 0.0})
    if workload.engine.engine == "smolctl":
        ours, loss = open_smolctl(model)
        return TrainingStep(lambda: loss(inputs, targets), make_optimizer(ours, settings))
    network, loss = open_transformers(model)
    adamw = settings.model_dump(include={"betas", "eps", "weight_decay"})
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, fused=True, **adamw)
    return TrainingStep(lambda: loss(inputs, targets), optimizer)


def batch(workload: Workload) -> tuple[Tensor, Tensor]:
    """Tokens (sequences, length) and their next tokens."""
    sizes, text = workload.sizes, workload.text
    rows = torch.tensor([text[at % len(text)][: sizes.length + 1] for at in range(sizes.sequences)])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
