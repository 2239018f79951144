"""What a run will cost, said before it starts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from smolctl.arithmetic import TrainingMemory, count_parameters, training_memory
from smolctl.config import RunConfig
from smolctl.data.batches import document_ids
from smolctl.model.network import Transformer

# Bytes of a checkpoint for each parameter: the float32 weight and AdamW's two float32 moments.
CHECKPOINT_BYTES_PER_PARAMETER = 12


@dataclass(frozen=True)
class Plan:
    """The run in numbers. Times are measured on this machine with one real forward and backward."""

    parameters: int
    steps: int  # still to do
    batch_size: int
    sequence_length: int
    tokens_per_step: int
    tokens: int
    corpus_tokens: int
    passes: float  # over the corpus
    tokens_per_parameter: float
    memory: TrainingMemory
    checkpoint_bytes: int  # of one
    checkpoints_kept: int
    disk_bytes: int  # of all that stay
    disk_free_bytes: int
    device: str
    tokens_per_second: float
    eta_s: float


def make_plan(
    config: RunConfig, done: int, corpus_tokens: int, tokens_per_second: float, disk_free: int, device: str
) -> Plan:
    """Put the numbers together. `done` steps lie behind the run already."""
    parameters = count_parameters(config.model).unique
    steps = config.train.steps - done
    tokens = steps * config.tokens_per_step
    checkpoint = parameters * CHECKPOINT_BYTES_PER_PARAMETER
    written = 1 + math.ceil(steps / config.checkpoint.every)  # the first one before step 1
    kept = min(written, config.checkpoint.keep_last) if config.checkpoint.keep_last else written
    if config.checkpoint.keep_every:
        kept += steps // config.checkpoint.keep_every
    return Plan(
        parameters=parameters,
        steps=steps,
        batch_size=config.train.batch_size,
        sequence_length=config.data.sequence_length,
        tokens_per_step=config.tokens_per_step,
        tokens=tokens,
        corpus_tokens=corpus_tokens,
        passes=tokens / corpus_tokens,
        tokens_per_parameter=tokens / parameters,
        memory=training_memory(config.model, config.micro_batch_size, config.data.sequence_length),
        checkpoint_bytes=checkpoint,
        checkpoints_kept=kept,
        disk_bytes=kept * checkpoint,
        disk_free_bytes=disk_free,
        device=device,
        tokens_per_second=tokens_per_second,
        eta_s=tokens / tokens_per_second,
    )


def measure_speed(network: Transformer, batch: Tensor, document_end: int | None = None) -> float:
    """Tokens a second of a real forward and backward on a micro-batch (B, T + 1).

    Run once to warm up when that is cheap, then timed. Gradients are dropped and the random state is put
    back: the run that follows is the same with and without it.
    """
    state = torch.get_rng_state()
    network.train()
    documents = document_ids(batch[:, :-1], document_end)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        network.loss(batch[:, :-1], batch[:, 1:], documents=documents).div(batch.numel()).backward()
        network.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        if seconds > 2:  # the allocations of a first run are a small part of it
            break
    torch.set_rng_state(state)
    return batch.shape[0] * (batch.shape[1] - 1) / seconds
