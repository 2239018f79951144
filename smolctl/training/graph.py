"""The gradient of a step as one CUDA graph.

A step of SmolLM2-135M has about 2,000 kernels. Launching them one by one takes the CPU 100 ms, in which an
H100 could compute 16,384 tokens twice (docs/benchmarks.md); a graph is launched in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
WARMUPS = 3  # calls before the recording, for compiling and the libraries' workspaces; PyTorch's own number


class GradientGraph(Generic[T]):
    """A function that computes gradients of a network, recorded at its first call and replayed from then on.

    Args:
        network: on a GPU.
        function: adds gradients to those of the network, from tokens. It must not wait for results of the GPU
            or draw random numbers. The next call overwrites what it returns.
        tokens: an example; all other batches must have its shape.
    """

    def __init__(self, network: nn.Module, function: Callable[[Tensor], T], tokens: Tensor) -> None:
        self._tokens = tokens.clone()
        self._function = function  # keeps the tensors alive that the graph reads
        aside, current = torch.cuda.Stream(), torch.cuda.current_stream()
        # Parameters may have nodes of earlier gradients, of another stream, which is safe but warned of.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARMUPS):
                network.zero_grad(set_to_none=True)
                function(self._tokens)
        current.wait_stream(aside)
        network.zero_grad(set_to_none=True)  # the graph writes gradients to its own memory
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=aside):
            self._result = function(self._tokens)
        self._gradients = [(parameter, parameter.grad) for parameter in network.parameters()]

    def __call__(self, tokens: Tensor) -> T:
        """The function's result for these tokens; afterwards the network has exactly their gradients."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._result
