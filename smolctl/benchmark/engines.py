"""The engines: smolctl's, the plain PyTorch network that all outputs are compared with, and the peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from smolctl.benchmark.peers import open_peer
from smolctl.config import ModelConfig
from smolctl.generation.engine import Engine
from smolctl.generation.engines import EngineOptions, make_engine
from smolctl.generation.torch_engine import TorchEngine
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize, load_network
from smolctl.sources import open_source
from smolctl.sources.arrays import Array, as_array
from smolctl.sources.base import ArrayWeights, ModelSource

EngineName = Literal["smolctl", "reference", "transformers", "llama.cpp", "litgpt"]
# Names of the peers' packages on the package index.
PEERS: dict[EngineName, str] = {
    "transformers": "transformers",
    "llama.cpp": "llama-cpp-python",
    "litgpt": "litgpt",
}


@dataclass(frozen=True)
class EngineSpec:
    """An engine and the model that it opens in its own process."""

    engine: EngineName
    model: str  # a MODEL for smolctl, a file or folder for a peer
    threads: int
    precision: str = ""  # as shown to users; "": what the engine reports
    rival_of: str = ""  # smolctl's model with the same number of bits; "": compared with every one


class RandomWeights(ArrayWeights):
    """The weights of a new network; computing with them takes as long as with trained ones."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def stored(self) -> Iterator[tuple[str, Array]]:
        for name, tensor in initialize(self.config, 0).state_dict().items():
            yield name, as_array(tensor)


def open_weighted(model: str) -> ModelSource:
    """Open a source; one without weights, such as a preset, gets random ones."""
    source = open_source(model)
    weights = source.weights or RandomWeights(source.require_config())
    return dataclasses.replace(source, weights=weights)


def plain_network(model: str) -> Transformer:
    """The network in float32, as PyTorch runs it."""
    return load_network(open_weighted(model), torch.float32)


def open_engine(spec: EngineSpec, config: ModelConfig | None = None) -> Engine:
    """Load an engine's model.

    Args:
        spec: any.
        config: of a peer's model, if it has been read already: the time of smolctl's reader must not count
            for the peer.

    Raises:
        SmolError: the model cannot be read.
        ImportError: the peer is not installed.
    """
    if spec.engine == "smolctl":
        return make_engine(open_weighted(spec.model), EngineOptions(threads=spec.threads))
    if spec.engine == "reference":
        return TorchEngine(plain_network(spec.model).requires_grad_(False))
    return open_peer(
        spec.engine, spec.model, config or open_source(spec.model).require_config(), spec.threads
    )
