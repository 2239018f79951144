"""Who takes part: this toolkit's engine, the plain PyTorch network that answers are held against, peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from smolctl.config import ModelConfig
from smolctl.generation.engine import Engine
from smolctl.generation.engines import EngineOptions, make_engine
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize, load_network
from smolctl.sources import open_source
from smolctl.sources.base import ModelSource, Weights

EngineName = Literal["smolctl", "reference", "transformers", "llama.cpp", "litgpt"]
PEERS: tuple[EngineName, ...] = ("transformers", "llama.cpp", "litgpt")


@dataclass(frozen=True)
class Contender:
    """One engine on one file. It is sent to a process of its own, which opens it."""

    engine: EngineName
    model: str  # a MODEL for smolctl, the file or folder of a peer
    threads: int
    precision: str = ""  # how people call it; "": as the engine says itself
    rival_of: str = ""  # of this precision of ours, which stores the same bits; "": of all of them


class RandomWeights(Weights):
    """What a new network starts with: as fast as any other weights."""

    def __init__(self, source: ModelSource) -> None:
        self.config = source.require_config()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in initialize(self.config, 0).state_dict().items():
            yield name, tensor.detach()


def open_weighted(model: str) -> ModelSource:
    """A source; one without weights, such as a preset, gets random ones."""
    source = open_source(model)
    source.require_config()
    return source if source.weights else dataclasses.replace(source, weights=RandomWeights(source))


def plain_network(model: str) -> Transformer:
    """The network in float32, as PyTorch runs it."""
    return load_network(open_weighted(model), torch.float32)


def open_engine(contender: Contender, config: ModelConfig | None = None) -> Engine:
    """Load a contender.

    Args:
        contender: any.
        config: of a peer's model, where it has been read already: a peer need not wait for our reader.

    Raises:
        SmolError: its model cannot be read.
        ImportError: the peer is not installed.
    """
    if contender.engine == "smolctl":
        return make_engine(open_weighted(contender.model), EngineOptions())
    if contender.engine == "reference":
        from smolctl.generation.torch_engine import TorchEngine

        return TorchEngine(plain_network(contender.model).requires_grad_(False))
    from smolctl.benchmark.peers import open_peer

    return open_peer(contender, config or open_source(contender.model).require_config())
