"""One run of `levers.py`: the steps of `smolctl train` without Lightning, with the levers' own changes.

Everything is computed in float32, Muon's orthogonal factor too, and without TF32. What the number of a step
decides is read from a tensor, so that a GPU can replay the step as one graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from lever_recipes import Extras, Recipe, StepValues, sequences
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.adamw import adamw

from smolctl.config import RunConfig
from smolctl.evaluation.estimate import Floats
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize
from smolctl.training.optim.muon import ADAMW_RMS, NEWTON_SCHULZ, by_shape, orthogonalize
from smolctl.training.optim.optimizers import hidden_matrices

POLAR_EXPRESS = (  # of Amsel et al., arXiv 2505.16932, for five iterations and a safety factor of 1.02
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
LOOKAHEAD_MEMORY = 0.032  # share of the steps that EMA-Nesterov's mean movement remembers: 100 of 3,125
EAGER_STEPS = 3  # before a step is captured: every state and workspace exists then
AT_ONCE = 64  # sequences that are scored together


@dataclass(frozen=True)
class TrialData:
    """The corpus as every run reads it, on whatever machine.

    Attributes:
        train: tokens of all documents that are trained on.
        end: the token after each of them.
        held_out: (W, length + 1) tokens of sequences; each begins with `end`.
        counted: (W, length) whether a target of them counts.
        owners: (W, length) the observation that each target belongs to.
        sizes: (D,) bytes of each observation.
    """

    train: NDArray[np.uint16]
    end: int
    held_out: NDArray[np.uint16]
    counted: NDArray[np.bool_]
    owners: NDArray[np.int16]
    sizes: Floats

    @staticmethod
    def read(path: Path) -> TrialData:
        with np.load(path) as file:
            return TrialData(**{**file, "end": int(file["end"])})


class Steps:
    """The optimizer's step: that of `MuonAdamW`, and what the levers change in it.

    Matrices of one shape are kept as one stack (N, rows, columns).
    """

    def __init__(self, network: Transformer, config: RunConfig, extras: Extras) -> None:
        self.config, self.extras = config, extras
        hidden: list[list[Tensor]] = [[*stack] for stack in by_shape(hidden_matrices(network)).values()]
        known = {id(parameter) for stack in hidden for parameter in stack}
        others: list[Tensor] = [one for one in network.parameters() if id(one) not in known]
        self.tables = [parameter for parameter in others if parameter.dim() >= 2]
        self.norms = [parameter for parameter in others if parameter.dim() < 2]
        self.stacks = [(stack, torch.zeros_like(torch.stack(stack).detach())) for stack in hidden]
        self.squares = [torch.zeros_like(buffer[..., :1]) for _, buffer in self.stacks]
        self.moments = [
            {parameter: torch.zeros_like(parameter) for parameter in others},
            {parameter: torch.zeros_like(parameter) for parameter in others},
        ]
        self.counts = {parameter: parameter.new_zeros((), dtype=torch.float32) for parameter in others}

    @torch.no_grad()
    def step(self, rate: Tensor, momentum: Tensor, weight_decay: Tensor) -> None:
        """Update all parameters; the values are tensors (), on their device."""
        for (parameters, buffer), square in zip(self.stacks, self.squares, strict=True):
            gradients = torch.stack([_gradient(parameter) for parameter in parameters])
            buffer.lerp_(gradients, 1 - momentum)
            update = self._orthogonal(gradients.lerp(buffer, momentum))
            if self.extras.normuon:
                update = _even_rows(update, square, self.extras.normuon)
            update.mul_(rate * (ADAMW_RMS * math.sqrt(max(buffer.shape[1:]))))
            if self.extras.cautious:
                weights = torch.stack(parameters)
                update.add_(weights * (update * weights > 0) * (rate * weight_decay))
            else:
                torch._foreach_mul_(parameters, 1 - rate * weight_decay)
            torch._foreach_sub_(parameters, list(update.unbind()))
        self._adamw(self.tables, rate * self.config.optimizer.embedding_lr_multiplier, weight_decay)
        self._adamw(self.norms, rate * self.extras.norm_rate)

    def _orthogonal(self, matrices: Tensor) -> Tensor:
        if not self.extras.polar:
            return orthogonalize(matrices, NEWTON_SCHULZ, torch.float32)
        (a, b, c), *rest = POLAR_EXPRESS
        safe = (a / 1.02, b / 1.02**3, c / 1.02**5)  # the first iteration of matrices divided by 1.02
        return orthogonalize(matrices, (safe, *rest), torch.float32)

    def _adamw(self, parameters: list[Tensor], rate: Tensor, weight_decay: Tensor | None = None) -> None:
        if weight_decay is not None:
            torch._foreach_mul_(parameters, 1 - rate * weight_decay)
        first, second = self.moments
        betas = self.config.optimizer.betas
        adamw(
            parameters,
            [_gradient(parameter) for parameter in parameters],
            [first[parameter] for parameter in parameters],
            [second[parameter] for parameter in parameters],
            [],
            [self.counts[parameter] for parameter in parameters],
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=rate,
            weight_decay=0.0,
            eps=self.config.optimizer.eps,
            maximize=False,
        )


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _even_rows(update: Tensor, square: Tensor, decay: float) -> Tensor:
    """NorMuon: rows (N, rows, columns) divided by the root of their mean squares so far; the norms stay."""
    square.lerp_(update.square().mean(-1, keepdim=True), 1 - decay)
    even = update / (square.sqrt() + 1e-10)
    lengths = [matrices.norm(dim=(-2, -1), keepdim=True) for matrices in (update, even)]
    return even.mul_(lengths[0] / lengths[1])


class Trial:
    """A run that goes on step by step.

    Args:
        recipe: of it.
        seed: of the weights and of the order of the data.
        data: the corpus.
        device: to compute on.
        graphs: replay a step as a CUDA graph.
    """

    def __init__(
        self, recipe: Recipe, seed: int, data: TrialData, device: torch.device, graphs: bool = False
    ) -> None:
        self.recipe, self.data, self.device, self.graphs = recipe, data, device, graphs
        self.config, self.extras = recipe.config(seed), recipe.extras
        self.length = self.config.data.sequence_length
        self.sizes = recipe.batch_sizes(self.config)
        read = sequences(data.train, data.end, self.extras, sum(self.sizes), self.length, seed)
        self.tokens = torch.from_numpy(read).to(device)
        self.network = initialize(self.config.model, self.config.train.seed).to(device).train()
        self.steps = Steps(self.network, self.config, self.extras)
        self.parameters: list[Tensor] = list(self.network.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters if self.extras.average]
        self.movement = [
            torch.zeros_like(parameter) for parameter in self.parameters if self.extras.lookahead
        ]
        self.values = torch.zeros(4, device=device)  # those of `StepValues`
        self.losses = torch.zeros(recipe.steps, device=device)  # nats per token
        self.done = 0
        self._captured: dict[int, tuple[Tensor, Tensor, torch.cuda.CUDAGraph]] = {}
        self._eager: dict[int, int] = {}  # steps so far of every number of sequences

    def step(self) -> None:
        """Take the next step."""
        size, first = self.sizes[self.done], sum(self.sizes[: self.done])
        batch = self.tokens[first : first + size]
        values = StepValues.of(self.done + 1, self.config, self.extras)
        self.values.copy_(torch.tensor(astuple(values)))
        if not self.graphs:
            loss = self._step(batch)
        elif size in self._captured:
            tokens, loss, graph = self._captured[size]
            tokens.copy_(batch)
            graph.replay()
        else:
            loss = self._step_beside(batch)
        self.losses[self.done] = loss
        self.done += 1

    def _step_beside(self, batch: Tensor) -> Tensor:
        """A step on a stream of its own, as CUDA asks for before a capture, which follows the last one."""
        size = len(batch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._step(batch)
        torch.cuda.current_stream().wait_stream(stream)
        self._eager[size] = self._eager.get(size, 0) + 1
        if self._eager[size] == EAGER_STEPS:
            graph, tokens = torch.cuda.CUDAGraph(), batch.clone()
            with torch.cuda.graph(graph):
                captured = self._step(tokens)
            self._captured[size] = (tokens, captured, graph)
        return loss

    def _step(self, batch: Tensor) -> Tensor:
        """One step on tokens (sequences, length + 1); its loss in nats per token, ()."""
        rate, momentum, weight_decay, lookahead = self.values.unbind()
        if self.movement:
            before = [parameter.detach().clone() for parameter in self.parameters]
            with torch.no_grad():
                torch._foreach_add_(self.parameters, torch._foreach_mul(self.movement, lookahead))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.extras.bfloat16):
            loss = self.network.loss(batch[:, :-1], batch[:, 1:]) / batch[:, 1:].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.gradient_clip or math.inf)
        self.steps.step(rate, momentum, weight_decay)
        with torch.no_grad():
            if self.movement:
                moved = torch._foreach_sub(self.parameters, before)
                torch._foreach_lerp_(self.movement, moved, self._weight(LOOKAHEAD_MEMORY))
            if self.average:
                torch._foreach_lerp_(self.average, self.parameters, self._weight(self.extras.average))
        for parameter in self.parameters:
            parameter.grad = None
        return loss.detach()

    def _weight(self, share: float) -> float:
        """What a moving average takes of the newest value, for a time constant in shares of the run."""
        return 1 / max(1.0, share * self.recipe.steps)

    @torch.no_grad()
    def score(self) -> Floats:
        """Bits of every observation of the held-out text, (D,)."""
        if self.average:
            torch._foreach_copy_(self.parameters, self.average)
        self.network.eval()
        found = np.zeros(len(self.data.sizes))
        for first in range(0, len(self.data.held_out), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            tokens = torch.from_numpy(self.data.held_out[part].astype(np.int64)).to(self.device)
            nats = self.network.token_losses(tokens[:, :-1], tokens[:, 1:]).double().cpu().numpy()
            counted = self.data.counted[part]
            np.add.at(found, self.data.owners[part][counted], nats[counted] / math.log(2))
        return found


def windows_of(
    documents: Sequence[NDArray[np.int64]], begin: int, length: int
) -> tuple[NDArray[np.uint16], NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Documents as `smolctl compare` reads them: alone, in sequences that overlap by half, after `begin`.

    Returns:
        Tokens (W, length + 1), whether a target counts (W, length), and of each target its document and its
        place there, both (W, length).
    """
    rows, counts, owners, places = [], [], [], []
    for number, ids in enumerate(documents):
        done = 0
        while done < len(ids):
            stop = min(len(ids), max(length, done + length // 2))
            start = max(0, stop - length)
            row = np.full(length + 1, begin)
            row[1 : stop - start + 1] = ids[start:stop]
            place = start + np.arange(length)
            rows.append(row)
            counts.append((done <= place) & (place < stop))
            owners.append(np.full(length, number))
            places.append(np.minimum(place, len(ids) - 1))
            done = stop
    return np.stack(rows).astype(np.uint16), np.stack(counts), np.stack(owners), np.stack(places)
