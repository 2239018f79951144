"""From suites and contenders to jobs that are ready to run, each with the answer it should give."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from smolctl.benchmark.contenders import Contender
from smolctl.benchmark.lineup import copy_apart, weight_files
from smolctl.benchmark.parts import Part, parts_of
from smolctl.benchmark.process import Worker
from smolctl.benchmark.work import Facts, Job, Measured, Sizes, Tokens, cut
from smolctl.config.run import OptimizerConfig
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError, SmolError, UsageError
from smolctl.sources.base import ModelSource

SUITES = ("load", "prefill", "decode", "batch", "train", "tokenize", "checkpoint")
# What each engine can be compared in.
SUITES_OF = {
    "smolctl": set(SUITES),
    "transformers": {"load", "prefill", "decode", "batch", "train", "tokenize"},
    "llama.cpp": {"load", "prefill", "decode", "batch"},
    "litgpt": {"prefill", "decode", "batch"},  # its weights come through our reader
}
# Work that does not depend on how the weights are stored: the first contender of an engine does it alone.
ONCE = {"train", "tokenize", "checkpoint"}
DOCUMENT_CHARACTERS = 400_000
# Work that shares a process: a loaded engine, or none that stays loaded.
PROCESS_OF = {
    "prefill": "engine",
    "decode": "engine",
    "batch": "engine",
    "load": "files",
    "tokenize": "files",
}


@dataclass(frozen=True)
class Entry:
    """A job that is ready: `run` does it once."""

    job: Job
    run: Callable[[], Measured]
    parts: tuple[Part, ...]
    facts: Facts
    process: int  # that does it


def choose_suites(source: ModelSource, asked: Sequence[str]) -> tuple[str, ...]:
    """The suites to run: all that the model has what they need, or those that were asked for.

    Raises:
        UsageError: there is no such suite.
        InputError: one that was asked for cannot be run with this model.
    """
    for suite in asked:
        if suite not in SUITES:
            raise UsageError(f"--suite {suite} does not exist", f"Take {', '.join(SUITES)}.")
    missing = {}
    if not source.tensors:
        missing["load"] = f"a {source.kind.value} has no weights to load"
    if source.tokenizer_reader is None:
        missing["tokenize"] = "there is no tokenizer beside the weights"
    for suite in asked:
        if suite in missing:
            raise InputError(f"{source.id}: {missing[suite]}", f"Leave out --suite {suite}.")
    return tuple(suite for suite in SUITES if (suite in asked if asked else suite not in missing))


def make_jobs(
    source: ModelSource, contenders: Sequence[Contender], suites: Sequence[str], batch: int, folder: Path
) -> tuple[Job, ...]:
    """Every job of every contender, those of one suite side by side."""
    config, run = source.require_config(), source.run
    sizes = Sizes.fitting(config, run, batch)
    document, text = _text(source, sizes)
    optimizer = run.optimizer if run else OptimizerConfig()
    jobs = []
    for suite in suites:
        seen = set()
        for contender in contenders:
            again = suite in ONCE and contender.engine in seen
            if suite not in SUITES_OF[contender.engine] or again:
                continue
            seen.add(contender.engine)
            job = Job(suite, contender, sizes, text, optimizer, folder=str(folder))
            if suite == "load":
                jobs += _loads(job)
            else:
                jobs.append(replace(job, document=document) if suite == "tokenize" else job)
    return tuple(jobs)


def _loads(job: Job) -> list[Job]:
    """A cold and a warm load; a warm one alone where it is not known which files are read."""
    model = job.contender.model
    files = weight_files(model)
    warm = replace(job, files=tuple(map(str, files)))
    if not files:
        return [warm]
    copy = copy_apart(model, files, Path(job.folder))
    return [replace(job, files=tuple(map(str, weight_files(copy))), cold_copy=copy), warm]


def _text(source: ModelSource, sizes: Sizes) -> tuple[str, Tokens]:
    """Python's language reference, as text and as the tokens that are read; random tokens where the model
    has no tokenizer."""
    from pydoc_data.topics import topics

    document = "\n\n".join(topics[name] for name in sorted(topics))[:DOCUMENT_CHARACTERS]
    files = source.read_tokenizer()
    if files is not None:
        return document, cut(Tokenizer.from_files(files, source.id).encode(document[:40_000]), sizes)
    chance = random.Random(0)
    ids = [chance.randrange(source.require_config().vocab_size) for _ in range(4096)]
    return document, cut(ids, sizes)


def expected_answers(jobs: Sequence[Job], source: ModelSource, threads: int) -> dict[str, Tensor]:
    """What the plain PyTorch network answers to each kind of job, from the stored weights in float32."""
    import torch

    expected: dict[str, Tensor] = {"checkpoint": torch.zeros(1)}  # no tensor differs
    reference = Contender("reference", source.id, threads)
    with Worker(reference) as worker:
        for job in jobs:
            if job.kind not in expected:
                asked = replace(job, contender=reference, cold_copy="")
                worker.prepare(asked)
                expected[job.kind] = worker.run(asked).lap.answer
    return expected


def prepare(jobs: Sequence[Job], source: ModelSource, stack: ExitStack) -> tuple[list[Entry], list[str]]:
    """Start the contenders' processes, load what they need and do each job once to warm up.

    Args:
        jobs: of all contenders.
        source: of the weights.
        stack: ends the processes when it is left.

    Returns:
        What is ready, and a line for everything of a peer that is left out.

    Raises:
        SmolError: ours cannot run.
    """
    workers: dict[tuple[Contender, str], Worker] = {}
    for job in jobs:  # all start before the first is waited for
        if _place(job) not in workers:
            workers[_place(job)] = stack.enter_context(Worker(job.contender))
    entries, left_out = [], []
    for job in jobs:
        worker = workers[_place(job)]
        try:
            facts = worker.prepare(job)
            worker.run(job)
        except SmolError as error:
            if job.contender.engine == "smolctl":
                raise
            left_out.append(f"left out: {error.message}")
            continue
        entries.append(_entry(job, worker, facts, source))
    return entries, left_out


def _place(job: Job) -> tuple[Contender, str]:
    """Whose process a job belongs to: work that uses a loaded engine shares it."""
    return job.contender, PROCESS_OF.get(job.kind, job.kind)


def _entry(job: Job, worker: Worker, facts: Facts, source: ModelSource) -> Entry:
    facts = replace(facts, precision=job.contender.precision or facts.precision or "float32")
    size = sum(Path(file).stat().st_size for file in job.files)
    parts = parts_of(job, source.require_config(), facts, size)
    return Entry(job, lambda: worker.run(job), parts, facts, worker.pid)
