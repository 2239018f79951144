"""An engine behind smolctl's interface: smolctl's own, or transformers."""

from __future__ import annotations

import sys
import time
from functools import partial

import numpy as np
import torch
from serve_engine import Run, Tokens, main

from smolctl import __version__
from smolctl.benchmark.engines import EngineSpec, open_engine
from smolctl.cores import sharing_cores
from smolctl.generation.engine import Cache, Engine


def load(name: str, model: str, threads: int) -> Run:
    torch.set_num_threads(threads)
    engine = open_engine(EngineSpec(name, model, threads))  # type: ignore[arg-type]  # of the command line
    caches: dict[tuple[int, int], Cache] = {}
    return partial(run, engine, caches)


def run(
    engine: Engine, caches: dict[tuple[int, int], Cache], tokens: Tokens, prompt: int, file: str
) -> float:
    shape = len(tokens), len(tokens[0])
    cache = caches[shape] = caches.get(shape) or engine.allocate(*shape)
    for sequence in range(len(tokens)):
        cache.truncate(sequence, 0)
    started = time.perf_counter()
    engine.forward([ids[:prompt] for ids in tokens], cache).argmax(axis=-1)
    kept = []
    if prompt < len(tokens[0]):
        started = time.perf_counter()
    for at in range(prompt, len(tokens[0])):
        logits = engine.forward([ids[at : at + 1] for ids in tokens], cache)
        logits.argmax(axis=-1)
        kept += [logits] if file else []
    seconds = time.perf_counter() - started
    if file:
        np.concatenate(kept).astype(np.float32).tofile(file)
    return seconds


if __name__ == "__main__":
    with sharing_cores():
        main(partial(load, sys.argv[4]), __version__)
