"""Turns the times of a workload into metrics: units, amounts, and the minimum of memory traffic and
arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from smolctl.arithmetic import count_parameters, forward_flops_per_token, kv_cache_bytes_per_token
from smolctl.benchmark.correctness import bits_of
from smolctl.benchmark.limits import Cost
from smolctl.benchmark.workload import EngineFacts, Workload
from smolctl.config import ModelConfig

SECONDS, TOKENS, MEGABYTES = "s", "tokens/s", "MB/s"
# AdamW reads weights, gradients and two moments, and writes all but the gradients.
ADAMW_TRANSFERS, FLOAT = 7, 4


@dataclass(frozen=True)
class Metric:
    """One number that a workload measures."""

    name: str  # a suite in results: "train-forward" of the workload "train"
    unit: str
    amount: float  # of tokens or megabytes in a run; 1 for seconds
    work: str  # description of the work, for people and for comparing with a baseline
    cost: Cost

    def value(self, seconds: float) -> float:
        """Convert the seconds of a run to the metric's unit."""
        return seconds if self.unit == SECONDS else self.amount / seconds


def metrics_of(
    workload: Workload, config: ModelConfig, facts: EngineFacts, file_bytes: int
) -> tuple[Metric, ...]:
    """The metrics of a workload, in the order of its measured seconds; loading reads `file_bytes`."""
    sizes = workload.sizes
    if workload.suite == "load":
        # The disk's own speed limit is not measured.
        cost = Cost() if workload.cold_copy else Cost(bytes=file_bytes)
        name = "load-cold" if workload.cold_copy else "load-warm"
        return (Metric(name, SECONDS, 1, "until the first token is there", cost),)
    if workload.suite == "prefill":
        tokens = sizes.prefill
        head = 2 * config.vocab_size * config.hidden_size  # multiplied for the last token only
        flops = tokens * forward_flops_per_token(config, tokens) - (tokens - 1) * head
        cost = Cost(facts.weight_bytes, flops, _dtype(facts.precision))
        return (Metric("prefill", TOKENS, tokens, f"{tokens} tokens", cost),)
    if workload.suite in ("decode", "batch"):
        return (_decoding(workload, config, facts),)
    if workload.suite == "train":
        return _training(workload, config)
    if workload.suite == "tokenize":
        megabytes = len(workload.document.encode()) / 1e6
        return (Metric("tokenize", MEGABYTES, megabytes, f"{megabytes:.2f} MB in documents of 4 kB", Cost()),)
    states = 1 if workload.optimizer.name == "muon" else 2
    megabytes = FLOAT * count_parameters(config).unique * (1 + states) / 1e6
    kinds = (("save", "written, synced, read back, compared"), ("load", "from the system's memory"))
    return tuple(Metric(f"checkpoint-{kind}", MEGABYTES, megabytes, work, Cost()) for kind, work in kinds)


def _decoding(workload: Workload, config: ModelConfig, facts: EngineFacts) -> Metric:
    sizes = workload.sizes
    sequences = sizes.batch if workload.suite == "batch" else 1
    dtype = "float32" if bits_of(facts.precision) == 32 else "float16"
    behind = sizes.prompt + sizes.decoded // 2  # tokens in the cache, on average
    cache = sequences * behind * kv_cache_bytes_per_token(config, dtype)
    flops = sequences * sizes.decoded * forward_flops_per_token(config, 2 * behind)
    cost = Cost((facts.weight_bytes + cache) * sizes.decoded, flops, _dtype(facts.precision))
    many = f"{sequences} × " if sequences > 1 else ""
    name = "decode-batch" if workload.suite == "batch" else "decode"
    work = f"{many}{sizes.decoded} tokens after {sizes.prompt}"
    return Metric(name, TOKENS, sequences * sizes.decoded, work, cost)


def _training(workload: Workload, config: ModelConfig) -> tuple[Metric, ...]:
    sizes = workload.sizes
    optimizer = workload.optimizer.name if workload.engine.engine == "smolctl" else "adamw"
    tokens = sizes.sequences * sizes.length
    forward = tokens * forward_flops_per_token(config, sizes.length)
    moved = ADAMW_TRANSFERS * FLOAT * count_parameters(config).unique if optimizer == "adamw" else 0
    size = f"{sizes.sequences} × {sizes.length} tokens"
    update = Cost(bytes=moved)
    return (
        Metric("train-step", TOKENS, tokens, f"{size}, {optimizer}", Cost(moved, 3 * forward)),
        Metric("train-forward", SECONDS, 1, size, Cost(flops=forward)),
        Metric("train-backward", SECONDS, 1, size, Cost(flops=2 * forward)),
        Metric("train-optimizer", SECONDS, 1, f"{optimizer}, gradients clipped", update),
    )


def _dtype(precision: str) -> str:
    """The narrowest type in which the matmuls could be computed."""
    return {32: "float32", 16: "bfloat16"}.get(bits_of(precision), "int8")
