"""The cost of a run, estimated before it starts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smolctl.arithmetic import count_parameters, run_memory
from smolctl.config import RunConfig
from smolctl.data.batches import sequences_of
from smolctl.data.tokens.corpus import TokenizedCorpus
from smolctl.model.functional import recomputes_swiglu
from smolctl.model.network import Transformer
from smolctl.runs.events import RunPlan
from smolctl.timing import synchronized_time
from smolctl.training.device import autocast, muon_dtype
from smolctl.training.optim.muon import by_shape, orthogonalize
from smolctl.training.optim.optimizers import hidden_matrices
from smolctl.training.optim.schedule import outline

# With several micro-batches, glibc's allocator leaves gaps between tensors of about half the size of the
# gradients. Measured; see docs/benchmarks.md.
GAPS_PER_GRADIENT_BYTE = 0.5


def make_plan(
    config: RunConfig,
    done: int,
    corpus: TokenizedCorpus,
    tokens_per_second: float,
    disk_free: int,
    device: str,
    sequences: int,
    framework: int,
) -> RunPlan:
    """Combine the numbers of a plan.

    Args:
        config: of the run.
        done: number of finished steps.
        corpus: of the run.
        tokens_per_second: as measured.
        disk_free: bytes available for checkpoints.
        device: "cpu" or "cuda".
        sequences: in memory at the same time on one device.
        framework: bytes of main memory that the process uses without the run, if they count.
    """
    parameters = count_parameters(config.model).unique
    steps = config.train.steps - done
    tokens = steps * config.tokens_per_step
    dtype = torch.bfloat16 if config.train.precision == "bf16-true" else torch.float32
    recomputed = device == "cpu" and recomputes_swiglu(torch.empty(0, config.model.hidden_size, dtype=dtype))
    memory = run_memory(config, sequences, device=device, recomputed=recomputed)
    accumulates = config.micro_batch_size < config.train.batch_size
    gaps = round(GAPS_PER_GRADIENT_BYTE * memory.gradients) if device == "cpu" and accumulates else 0
    checkpoint = memory.weights + memory.optimizer
    kept = _most_checkpoints(config, steps, corpus.validation is not None)
    return RunPlan(
        parameters=parameters,
        steps=steps,
        batch_size=config.train.batch_size,
        sequence_length=config.data.sequence_length,
        tokens_per_step=config.tokens_per_step,
        tokens=tokens,
        corpus_tokens=len(corpus.train),
        held_out_tokens=len(corpus.validation or ()),
        documents=corpus.documents,
        duplicates=corpus.duplicates,
        epochs=tokens / len(corpus.train),
        tokens_per_parameter=tokens / parameters,
        schedule=outline(config, done),
        memory=memory,
        memory_bytes=framework + memory.total + gaps,
        framework_bytes=framework,
        gap_bytes=gaps,
        checkpoint_bytes=checkpoint,
        checkpoints_kept=kept,
        disk_bytes=kept * checkpoint,
        disk_free_bytes=disk_free,
        device=device,
        tokens_per_second=tokens_per_second,
        eta_s=tokens / tokens_per_second,
        compiles=config.train.compile is True,
    )


def _most_checkpoints(config: RunConfig, steps: int, validates: bool) -> int:
    """The largest number of checkpoints at the end of a run."""
    settings, keep_last = config.checkpoint, config.checkpoint.keep_last
    written = 2 + (steps - 1) // settings.every  # at step 0, between, and at the end
    if config.init_from is not None:
        written -= 1  # that of step 0 has no weights
    if settings.keep_best and (every := config.validation.every) and validates:
        # Each validation may be better than those before.
        written += (steps - 1) // every - (steps - 1) // math.lcm(every, settings.every)
        keep_last += bool(keep_last)
    kept = min(written, keep_last or written)
    return kept + (steps // settings.keep_every if settings.keep_every else 0)


def measure_training_speed(
    network: Transformer, batch: Tensor, config: RunConfig, document_end: int | None = None
) -> float:
    """Tokens per second of a step, from forward and backward passes of a micro-batch (B, T + 1).

    First with one sequence, which warms up and is sufficient if it takes long, then with all; on a GPU three
    times, because its libraries choose their kernels at the first call with a shape. Muon's orthogonalization
    is also timed; AdamW's update, at most a few per cent of a step, is not, and blocks are not compiled yet.
    Gradients are dropped and the random state is restored, so the measurement does not affect the run.

    Args:
        network: on the device to measure.
        batch: on the same device.
        config: of the run.
        document_end: token that ends a document, if attention stays within documents.
    """
    state = torch.get_rng_state()
    network.train()
    device = batch.device
    forward = update = tokens = 0.0
    for part in (batch[:1], *[batch] * (3 if device.type == "cuda" else 1)):
        asked, tokens = sequences_of(part, document_end), part[:, 1:].numel()
        started = synchronized_time(device)
        with autocast(config, device):
            loss, _ = network.training_loss(
                asked.inputs, asked.targets, config.train.z_loss, asked.documents, asked.trained
            )
        loss.div(tokens).backward()
        forward = synchronized_time(device) - started
        if config.optimizer.name == "muon":
            started = synchronized_time(device)
            _orthogonalize_gradients(network, muon_dtype(config, device))
            update = synchronized_time(device) - started
        network.zero_grad(set_to_none=True)
        if forward > 2:  # seconds: the allocations of a first run are a small part of that
            break
    torch.set_rng_state(state)
    return config.tokens_per_step / (forward * config.tokens_per_step / tokens + update)


def _orthogonalize_gradients(network: Transformer, dtype: torch.dtype | None) -> None:
    """The work of Muon for the gradients of a step, without the update."""
    for members in by_shape(hidden_matrices(network)).values():
        gradients = [parameter.grad for parameter in members if parameter.grad is not None]
        orthogonalize(torch.stack(gradients), dtype=dtype)
