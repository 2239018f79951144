"""The suites, their workloads for each engine, and the outputs that are expected."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from smolctl.benchmark import measure
from smolctl.benchmark.engine_files import copy_apart, weight_files
from smolctl.benchmark.engines import EngineSpec
from smolctl.benchmark.metrics import Metric, metrics_of
from smolctl.benchmark.workload import EngineFacts, Run, Sizes, Tokens, Workload, cut
from smolctl.config.run import OptimizerConfig
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError, SmolError, UsageError
from smolctl.sources.base import ModelSource
from smolctl.worker import Worker

SUITES = ("load", "prefill", "decode", "batch", "train", "tokenize", "checkpoint")
# The suites that each engine supports.
SUITES_OF = {
    "smolctl": set(SUITES),
    "transformers": {"load", "prefill", "decode", "batch", "train", "tokenize"},
    "llama.cpp": {"load", "prefill", "decode", "batch"},
    "litgpt": {"prefill", "decode", "batch"},  # its weights are read by smolctl: no load
}
# Suites that do not depend on how the weights are stored: only the first model of each engine runs them.
ONCE = {"train", "tokenize", "checkpoint"}
DOCUMENT_CHARACTERS = 400_000
# Suites that share a process with another suite, because they share a loaded engine or the files of a model.
SHARES_PROCESS_WITH = {"prefill": "decode", "batch": "decode", "load": "tokenize"}


@dataclass(frozen=True)
class PreparedWorkload:
    """A workload that is loaded and warmed up in its process; calling `run` runs it once."""

    workload: Workload
    run: Run
    metrics: tuple[Metric, ...]
    facts: EngineFacts
    process: int  # process id


def choose_suites(source: ModelSource, asked: Sequence[str]) -> tuple[str, ...]:
    """The suites to run: the requested ones, or every one that the model supports.

    Raises:
        UsageError: there is no such suite.
        InputError: a requested suite does not support this model.
    """
    missing = {}
    if not source.tensors:
        missing["load"] = f"a {source.kind.value} has no weights to load"
    if source.tokenizer_reader is None:
        missing["tokenize"] = "there is no tokenizer beside the weights"
    for suite in asked:
        if suite not in SUITES:
            raise UsageError(f"--suite {suite} does not exist", f"Use {', '.join(SUITES)}.")
        if suite in missing:
            raise InputError(f"{source.id}: {missing[suite]}", f"Leave out --suite {suite}.")
    return tuple(suite for suite in SUITES if (suite in asked if asked else suite not in missing))


def make_workloads(
    source: ModelSource, engines: Sequence[EngineSpec], suites: Sequence[str], batch: int, folder: Path
) -> tuple[Workload, ...]:
    """All workloads of all engines, grouped by suite."""
    run = source.run
    sizes = Sizes.fitting(source.require_config(), run, batch)
    document, text = reference_text(source, sizes)
    optimizer = run.optimizer if run else OptimizerConfig()
    workloads = []
    for suite in suites:
        seen = set()
        for engine in engines:
            again = suite in ONCE and engine.engine in seen
            if suite not in SUITES_OF[engine.engine] or again:
                continue
            seen.add(engine.engine)
            workload = Workload(suite, engine, sizes, text, optimizer, folder=str(folder))
            if suite == "load":
                workloads += _loads(workload)
            else:
                workloads.append(replace(workload, document=document) if suite == "tokenize" else workload)
    return tuple(workloads)


def _loads(workload: Workload) -> list[Workload]:
    """A cold and a warm load; only a warm one if the files that loading reads are not known."""
    model = workload.engine.model
    files = weight_files(model)
    warm = replace(workload, files=tuple(map(str, files)))
    if not files:
        return [warm]
    copy = copy_apart(model, files, Path(workload.folder))
    return [replace(workload, files=tuple(map(str, weight_files(copy))), cold_copy=copy), warm]


def reference_text(source: ModelSource, sizes: Sizes) -> tuple[str, Tokens]:
    """Python's language reference as text and as tokens; random tokens if the model has no tokenizer."""
    from pydoc_data.topics import topics

    document = "\n\n".join(topics[name] for name in sorted(topics))[:DOCUMENT_CHARACTERS]
    files = source.read_tokenizer()
    if files is not None:
        return document, cut(Tokenizer.from_files(files, source.id).encode(document[:40_000]), sizes)
    chance = random.Random(0)
    ids = [chance.randrange(source.require_config().vocab_size) for _ in range(4096)]
    return document, cut(ids, sizes)


def expected_outputs(workloads: Sequence[Workload], source: ModelSource, threads: int) -> dict[str, Tensor]:
    """The output of the plain PyTorch network in each suite, from the stored weights in float32."""
    expected: dict[str, Tensor] = {"checkpoint": torch.zeros(1)}  # number of tensors that differ
    reference = EngineSpec("reference", source.id, threads)
    with Worker(reference.engine, threads) as worker:
        for workload in workloads:
            if workload.suite not in expected:
                asked = replace(workload, engine=reference, cold_copy="")
                expected[workload.suite] = worker.call(measure.run, asked).output
    return expected


def prepare(
    workloads: Sequence[Workload], source: ModelSource, stack: ExitStack
) -> tuple[list[PreparedWorkload], list[str]]:
    """Start the engines' processes, load what they need, and run each workload once to warm up.

    The processes end when the exit stack is closed.

    Returns:
        The prepared workloads, and a line for each of a peer's workloads that is left out.

    Raises:
        SmolError: smolctl's own engine cannot run.
    """
    workers: dict[tuple[EngineSpec, str], Worker] = {}
    for workload in workloads:  # start all of them before waiting for the first one
        if _process_of(workload) not in workers:
            worker = Worker(workload.engine.engine, workload.engine.threads)
            workers[_process_of(workload)] = stack.enter_context(worker)
    prepared, left_out = [], []
    for workload in workloads:
        engine, worker = workload.engine, workers[_process_of(workload)]
        try:
            facts = worker.call(measure.prepare, workload)
            worker.call(measure.run, workload)
        except SmolError as error:
            if engine.engine == "smolctl":
                raise
            left_out.append(f"left out of {workload.suite}: {error.message}")
            continue
        facts = replace(facts, precision=engine.precision or facts.precision or "float32")
        file_bytes = sum(Path(file).stat().st_size for file in workload.files)
        metrics = metrics_of(workload, source.require_config(), facts, file_bytes)
        run = partial(worker.call, measure.run, workload)
        prepared.append(PreparedWorkload(workload, run, metrics, facts, worker.pid))
    return prepared, left_out


def _process_of(workload: Workload) -> tuple[EngineSpec, str]:
    """Workloads with an equal key share a process."""
    return workload.engine, SHARES_PROCESS_WITH.get(workload.suite, workload.suite)
