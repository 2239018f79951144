"""The gradient of a step as one CUDA graph.

A step of SmolLM2-135M is some 2,000 kernels. Launched one by one they take the processor 100 ms, in which an
H100 computes 16,384 tokens twice over (docs/benchmarks.md); a graph is launched at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
WARMUPS = 3  # calls before the recording: compiling, libraries' workspaces; PyTorch's own number


class GradientGraph(Generic[T]):
    """A function that leaves gradients in a network, recorded at its first call and replayed from then on.

    Args:
        network: on a GPU.
        function: adds gradients to those of the network, from tokens; it waits for nothing that the GPU
            computes and draws no random numbers. What it returns is overwritten by the next call.
        tokens: an example. All others have its shape.
    """

    def __init__(self, network: nn.Module, function: Callable[[Tensor], T], tokens: Tensor) -> None:
        self._tokens = tokens.clone()
        self._function = function  # with the tensors that it holds: the graph reads them where they lie
        aside, current = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARMUPS):
                network.zero_grad(set_to_none=True)
                function(self._tokens)
        current.wait_stream(aside)
        network.zero_grad(set_to_none=True)  # the graph writes gradients of its own
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = function(self._tokens)
        self._gradients = [(parameter, parameter.grad) for parameter in network.parameters()]

    def __call__(self, tokens: Tensor) -> T:
        """What the function returns for these tokens; the network has their gradients, and no others."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._result
