"""The suites prefill, decode and batch, which need a loaded engine."""

from __future__ import annotations

import time

import numpy as np
import torch

from smolctl.benchmark.workload import Measurement, Run, Workload
from smolctl.generation.engine import Engine, Logits

KEEP_EVERY = 8  # the logits of every eighth decoded token are compared


def prefill(engine: Engine, workload: Workload) -> Run:
    """Process a prompt and return the logits after it."""
    tokens = [list(workload.text[0][: workload.sizes.prefill])]
    cache = engine.allocate(1, len(tokens[0]))

    def run() -> Measurement:
        cache.truncate(0, 0)
        started = time.perf_counter()
        logits = engine.forward(tokens, cache)
        return Measurement((time.perf_counter() - started,), torch.from_numpy(logits))

    return run


def decode(engine: Engine, workload: Workload) -> Run:
    """Decode each sequence token by token, and find the most probable token at every step.

    The continuation is given, so that all engines process the same tokens even if they would have chosen
    others; the prompt is processed before the clock starts.
    """
    sizes = workload.sizes
    text = workload.text[: sizes.batch if workload.suite == "batch" else 1]
    prompts = [list(ids[: sizes.prompt]) for ids in text]
    steps = [[[ids[sizes.prompt + at]] for ids in text] for at in range(sizes.decoded)]
    cache = engine.allocate(len(text), sizes.prompt + sizes.decoded)

    def run() -> Measurement:
        for sequence in range(len(text)):
            cache.truncate(sequence, 0)
        engine.forward(prompts, cache)
        kept: list[Logits] = []
        started = time.perf_counter()
        for at, step in enumerate(steps, 1):
            logits = engine.forward(step, cache)
            logits.argmax(axis=-1).tolist()
            if at % KEEP_EVERY == 0 or at == len(steps):
                kept.append(logits)
        return Measurement((time.perf_counter() - started,), torch.from_numpy(np.concatenate(kept)))

    return run
