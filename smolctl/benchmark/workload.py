"""A workload, which every engine runs in the same way, and a measurement of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from smolctl.benchmark.engines import EngineSpec
from smolctl.config import ModelConfig, RunConfig
from smolctl.config.run import OptimizerConfig

# Sizes where the model's context allows them: a prompt as long as a question, an answer of a paragraph,
# a document to read.
PROMPT, DECODED, PREFILL, BATCH = 32, 64, 512, 8
# Of a training step: the micro-batch of every preset that trains from scratch. A quarter of it shows another
# ratio: others take less time for each token of a small step, smolctl more (docs/benchmarks.md).
TRAIN_TOKENS = 2_048
TRAIN_LENGTH = 512  # of a sequence, where no recipe says
Tokens = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sizes:
    """How many tokens a run has. Only results of equal work are comparable."""

    prompt: int
    decoded: int
    prefill: int
    batch: int = 1  # sequences of batched decoding
    sequences: int = 1  # of a training step
    length: int = 1  # of each

    @staticmethod
    def fitting(config: ModelConfig, run: RunConfig | None, batch: int = BATCH) -> Sizes:
        """The usual sizes, or what the model's context has room for; a training step of TRAIN_TOKENS tokens,
        or of a recipe's micro-batch where that is less."""
        context = config.max_position_embeddings
        length = min(TRAIN_TOKENS, context, run.data.sequence_length if run else TRAIN_LENGTH)
        micro = run.micro_batch_size if run else TRAIN_TOKENS
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
class Workload:
    """What one engine does in one suite, as it is sent to the engine's process."""

    suite: str  # one of suites.SUITES
    engine: EngineSpec
    sizes: Sizes
    text: Tokens = ()  # for each sequence its tokens, prompt and continuation
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    document: str = ""  # text to tokenize
    cold_copy: str = ""  # the model to load from the disk, not the page cache; "": a warm load
    files: tuple[str, ...] = ()  # that a load reads
    folder: str = ""  # where files may be written


@dataclass(frozen=True)
class Measurement:
    """One run of a workload."""

    seconds: tuple[float, ...]  # for each metric of the workload
    output: Tensor  # logits, token ids, or a loss
    note: str = ""  # why this run does not count
    peak_bytes: int | None = None  # most memory that the process held meanwhile; None: not known


@dataclass(frozen=True)
class EngineFacts:
    """What an engine reports about itself."""

    name: str = ""  # and build, for people
    precision: str = ""
    weight_bytes: int = 0


Run = Callable[[], Measurement]


def cut(ids: Sequence[int], sizes: Sizes) -> Tokens:
    """A long text as the sequences of a batch, each from another place; repeated where it is short."""
    length = max(sizes.prefill, sizes.prompt + sizes.decoded, sizes.length + 1)
    stride = sizes.prompt + sizes.decoded
    needed = length + stride * sizes.batch
    long = (list(ids) * (needed // max(1, len(ids)) + 1))[:needed]
    return tuple(tuple(long[at * stride : at * stride + length]) for at in range(sizes.batch))
