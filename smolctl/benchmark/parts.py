"""What a job's times stand for: the unit, the amount of work, and what it cannot do without."""

from __future__ import annotations

from dataclasses import dataclass

from smolctl.arithmetic import count_parameters, forward_flops_per_token, kv_cache_bytes_per_token
from smolctl.benchmark.answers import bits_of
from smolctl.benchmark.limits import Cost
from smolctl.benchmark.work import Facts, Job
from smolctl.config import ModelConfig

SECONDS, TOKENS, MEGABYTES = "s", "tokens/s", "MB/s"
# AdamW reads weights, gradients and two moments, and writes all but the gradients.
ADAMW_PASSES, FLOAT = 7, 4


@dataclass(frozen=True)
class Part:
    """One number of a job."""

    suite: str
    unit: str
    amount: float  # of tokens or megabytes in a repeat; 1 for seconds
    work: str  # how much of what, for people and for comparing with a baseline
    cost: Cost

    def value(self, seconds: float) -> float:
        """Seconds of a repeat in the part's unit."""
        return seconds if self.unit == SECONDS else self.amount / seconds


def parts_of(job: Job, config: ModelConfig, facts: Facts, file_bytes: int) -> tuple[Part, ...]:
    """The numbers of a job, in the order of its laps.

    Args:
        job: any.
        config: of the network.
        facts: that the contender has told.
        file_bytes: that loading reads.
    """
    sizes = job.sizes
    if job.kind == "load":
        # The disk's own limit is not measured.
        cost = Cost() if job.cold_copy else Cost(bytes=file_bytes)
        name = "load-cold" if job.cold_copy else "load-warm"
        return (Part(name, SECONDS, 1, "until the first token is there", cost),)
    if job.kind == "prefill":
        tokens = sizes.prefill
        head = 2 * config.vocab_size * config.hidden_size  # its product is needed for the last token only
        flops = tokens * forward_flops_per_token(config, tokens) - (tokens - 1) * head
        cost = Cost(facts.weight_bytes, flops, _dtype(facts.precision))
        return (Part("prefill", TOKENS, tokens, f"{tokens} tokens", cost),)
    if job.kind in ("decode", "batch"):
        return (_decoding(job, config, facts),)
    if job.kind == "train":
        return _training(job, config)
    if job.kind == "tokenize":
        megabytes = len(job.document.encode()) / 1e6
        return (Part("tokenize", MEGABYTES, megabytes, f"{megabytes:.2f} MB in documents of 4 kB", Cost()),)
    states = 1 if job.optimizer.name == "muon" else 2
    megabytes = FLOAT * count_parameters(config).unique * (1 + states) / 1e6
    kinds = (("save", "written, synced, read back, compared"), ("load", "from the system's memory"))
    return tuple(Part(f"checkpoint-{kind}", MEGABYTES, megabytes, work, Cost()) for kind, work in kinds)


def _decoding(job: Job, config: ModelConfig, facts: Facts) -> Part:
    sizes = job.sizes
    sequences = sizes.batch if job.kind == "batch" else 1
    dtype = "float32" if bits_of(facts.precision) == 32 else "float16"
    behind = sizes.prompt + sizes.decoded // 2  # tokens in the cache, on average
    cache = sequences * behind * kv_cache_bytes_per_token(config, dtype)
    flops = sequences * sizes.decoded * forward_flops_per_token(config, 2 * behind)
    cost = Cost((facts.weight_bytes + cache) * sizes.decoded, flops, _dtype(facts.precision))
    many = f"{sequences} × " if sequences > 1 else ""
    name = "decode-batch" if job.kind == "batch" else "decode"
    work = f"{many}{sizes.decoded} tokens after {sizes.prompt}"
    return Part(name, TOKENS, sequences * sizes.decoded, work, cost)


def _training(job: Job, config: ModelConfig) -> tuple[Part, ...]:
    sizes, optimizer = job.sizes, job.optimizer.name if job.contender.engine == "smolctl" else "adamw"
    tokens = sizes.sequences * sizes.length
    forward = tokens * forward_flops_per_token(config, sizes.length)
    passes = ADAMW_PASSES * FLOAT * count_parameters(config).unique if optimizer == "adamw" else 0
    size = f"{sizes.sequences} × {sizes.length} tokens"
    update = Cost(bytes=passes)
    return (
        Part("train-step", TOKENS, tokens, f"{size}, {optimizer}", Cost(passes, 3 * forward)),
        Part("train-forward", SECONDS, 1, size, Cost(flops=forward)),
        Part("train-backward", SECONDS, 1, size, Cost(flops=2 * forward)),
        Part("train-optimizer", SECONDS, 1, f"{optimizer}, gradients clipped", update),
    )


def _dtype(precision: str) -> str:
    """The narrowest numbers that the products could be computed in."""
    return {32: "float32", 16: "bfloat16"}.get(bits_of(precision), "int8")
