"""The cost of loading a model and decoding a few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smolctl.errors import SmolError
from smolctl.generation.load import load_model
from smolctl.timing import peak_memory
from smolctl.worker import Worker

TOKENS = 8


@dataclass(frozen=True)
class Footprint:
    """The cost of loading, measured in an otherwise idle process."""

    load_s: float
    peak_bytes: int | None  # includes Python and PyTorch; None if the system does not report it


def measure_footprint(model: str) -> Footprint | None:
    """Measure the cost in a separate process, whose peak is that of one model; None if that is not
    possible.
    """
    try:
        with Worker("smolctl", torch.get_num_threads()) as worker:
            return worker.call(load_and_decode, model)
    except SmolError:
        return None


def load_and_decode(model: str) -> Footprint:
    """Measure the cost in this process."""
    loaded = load_model(model)
    engine = loaded.engine
    cache = engine.allocate(1, min(2 * TOKENS, engine.config.max_position_embeddings))
    token = int(engine.forward([[0]], cache).argmax())
    for _ in range(cache.capacity - 1 - TOKENS):
        token = int(engine.forward([[token]], cache).argmax())
    return Footprint(loaded.load_s, peak_memory(torch.device("cpu")))
