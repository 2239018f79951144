"""What is measured: pieces of work that every contender does the same way, each timed by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smolctl.benchmark.contenders import Contender
from smolctl.config import ModelConfig, RunConfig
from smolctl.config.run import OptimizerConfig
from smolctl.generation.engine import Engine

# Sizes where the model's context allows them: a prompt as long as a question, an answer of a paragraph,
# a document to read.
PROMPT, DECODED, PREFILL, BATCH = 32, 64, 512, 8
TRAIN_TOKENS, TRAIN_LENGTH = 1024, 512  # of a training step, at most
KEEP_EVERY = 8  # logits of every eighth decoded token are compared
Tokens = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sizes:
    """How much work of each kind a repeat does. Only results of equal work are comparable."""

    prompt: int
    decoded: int
    prefill: int
    batch: int
    sequences: int  # of a training step
    length: int  # of each

    @staticmethod
    def fitting(config: ModelConfig, run: RunConfig | None, batch: int = BATCH) -> Sizes:
        """The usual sizes, or what the model's context has room for; a training step as its recipe says,
        up to TRAIN_TOKENS tokens."""
        context = config.max_position_embeddings
        length = min(TRAIN_LENGTH, context, run.data.sequence_length if run else context)
        micro = run.micro_batch_size if run else 1
        prompt = max(1, min(PROMPT, context // 4))
        return Sizes(
            prompt=prompt,
            decoded=max(1, min(DECODED, context - prompt)),
            prefill=min(PREFILL, context),
            batch=batch,
            sequences=max(1, min(micro, TRAIN_TOKENS // length)),
            length=length,
        )


@dataclass(frozen=True)
class Job:
    """One piece of work of one contender, as it is sent to the contender's process."""

    kind: str  # a key of worker.BUILDERS
    contender: Contender
    sizes: Sizes
    text: Tokens = ()  # what is read: for each sequence its tokens, prompt and continuation
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    document: str = ""  # text to tokenize
    cold_copy: str = ""  # the model to load from the disk, its pages forgotten before; "": as it comes
    files: tuple[str, ...] = ()  # that a load reads
    folder: str = ""  # where files may be written


@dataclass(frozen=True)
class Lap:
    """One repeat."""

    seconds: tuple[float, ...]  # of each part of the work
    answer: Tensor  # what came out: logits, token ids, or a loss
    note: str = ""  # why this repeat does not count


@dataclass(frozen=True)
class Facts:
    """What a contender says of itself."""

    engine: str = ""  # name and build, for people
    precision: str = ""
    weight_bytes: int = 0


@dataclass(frozen=True)
class Measured:
    """A repeat with the most memory that its process held meanwhile."""

    lap: Lap
    peak_bytes: int | None


Work = Callable[[], Lap]


def prefill(engine: Engine, job: Job) -> Work:
    """Read a text and say what may come next."""
    tokens = [list(job.text[0][: job.sizes.prefill])]
    cache = engine.allocate(1, len(tokens[0]))

    def run() -> Lap:
        cache.truncate(0, 0)
        started = time.perf_counter()
        logits = engine.forward(tokens, cache)
        return Lap((time.perf_counter() - started,), logits.clone())

    return run


def decode(engine: Engine, job: Job) -> Work:
    """Continue each sequence token by token, with the likeliest one looked up each time.

    What comes next is given, so that all engines read the same tokens even where they would have chosen
    others; the prompt is read before the clock starts.
    """
    sizes = job.sizes
    count = sizes.batch if job.kind == "batch" else 1
    prompts = [list(ids[: sizes.prompt]) for ids in job.text[:count]]
    steps = [[[ids[sizes.prompt + at]] for ids in job.text[:count]] for at in range(sizes.decoded)]
    cache = engine.allocate(count, sizes.prompt + sizes.decoded)

    def run() -> Lap:
        for sequence in range(count):
            cache.truncate(sequence, 0)
        engine.forward(prompts, cache)
        kept: list[Tensor] = []
        started = time.perf_counter()
        for at, step in enumerate(steps, 1):
            logits = engine.forward(step, cache)
            logits.argmax(dim=-1).tolist()
            if at % KEEP_EVERY == 0 or at == len(steps):
                kept.append(logits)
        return Lap((time.perf_counter() - started,), torch.cat(kept))

    return run


def cut(ids: Sequence[int], sizes: Sizes) -> Tokens:
    """A long text as the sequences of a batch, each from another place; repeated where it is short."""
    length = max(sizes.prefill, sizes.prompt + sizes.decoded, sizes.length + 1)
    stride = sizes.prompt + sizes.decoded
    needed = length + stride * sizes.batch
    long = (list(ids) * (needed // max(1, len(ids)) + 1))[:needed]
    return tuple(tuple(long[at * stride : at * stride + length]) for at in range(sizes.batch))
