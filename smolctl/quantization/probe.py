"""`python -m smolctl.quantization.probe MODEL`: what loading a model and decoding a little of it costs.

A process of its own, so that the peak is that of one model: prints one line of JSON.
"""

from __future__ import annotations

import json
import sys

import torch

from smolctl.generation.load import load_model
from smolctl.timing import peak_memory

TOKENS = 8


def probe(model: str) -> dict[str, float | int | None]:
    """Seconds to load and the peak of memory in bytes, Python and PyTorch included."""
    loaded = load_model(model)
    engine = loaded.engine
    cache = engine.allocate(1, min(2 * TOKENS, engine.config.max_position_embeddings))
    token = int(engine.forward([[0]], cache).argmax())
    for _ in range(cache.capacity - 1 - TOKENS):
        token = int(engine.forward([[token]], cache).argmax())
    return {"load_s": loaded.load_s, "peak_bytes": peak_memory(torch.device("cpu"))}


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1])))
