"""A workload, which every engine runs in the same way, and the measurement of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from smolctl.benchmark.engines import EngineSpec
from smolctl.config import ModelConfig, RunConfig
from smolctl.config.run import OptimizerConfig

# Used if the model's context is long enough: a prompt the size of a question, an answer of a paragraph, and a
# document to process.
PROMPT, DECODED, PREFILL, BATCH = 32, 64, 512, 8
# Of a training step: the micro-batch of every preset that trains from scratch. With a quarter of it the ratio
# is different: other programs take less time per token in a small step, and smolctl takes more
# (docs/benchmarks.md).
TRAIN_TOKENS = 2_048
TRAIN_LENGTH = 512  # of a sequence, if there is no recipe
Tokens = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sizes:
    """The numbers of tokens in a run. Only results of equal work are comparable."""

    prompt: int
    decoded: int
    prefill: int
    batch: int = 1  # sequences in the batch suite
    sequences: int = 1  # sequences per training step
    length: int = 1  # tokens per sequence of a training step

    @staticmethod
    def fitting(config: ModelConfig, run: RunConfig | None, batch: int = BATCH) -> Sizes:
        """The usual sizes, or the largest that fit the model's context; a training step has TRAIN_TOKENS
        tokens, or a recipe's micro-batch if that is smaller.
        """
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
    """One engine's work in one suite, as it is sent to the engine's process."""

    suite: str  # a name from suites.SUITES
    engine: EngineSpec
    sizes: Sizes
    text: Tokens = ()  # tokens of each sequence: prompt and continuation
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    document: str = ""  # text to tokenize
    cold_copy: str = ""  # the model to load from the disk instead of the page cache; "": a warm load
    files: tuple[str, ...] = ()  # files that a load reads
    folder: str = ""  # where files may be written


@dataclass(frozen=True)
class Measurement:
    """One run of a workload."""

    seconds: tuple[float, ...]  # one for each metric of the workload
    output: Tensor  # logits, token ids, or a loss
    note: str = ""  # why this run does not count
    peak_bytes: int | None = None  # peak memory of the process during the run; None: not known


@dataclass(frozen=True)
class EngineFacts:
    """What an engine reports about itself."""

    name: str = ""  # name and build, for people
    precision: str = ""
    weight_bytes: int = 0


Run = Callable[[], Measurement]


def cut(ids: Sequence[int], sizes: Sizes) -> Tokens:
    """Cut a long text into the sequences of a batch, each from another position; a short text is repeated."""
    length = max(sizes.prefill, sizes.prompt + sizes.decoded, sizes.length + 1)
    stride = sizes.prompt + sizes.decoded
    needed = length + stride * sizes.batch
    long = (list(ids) * (needed // max(1, len(ids)) + 1))[:needed]
    return tuple(tuple(long[at * stride : at * stride + length]) for at in range(sizes.batch))
