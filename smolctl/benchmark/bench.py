"""One call of `bench`: who takes part, what they do in turns, and what came out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smolctl.benchmark.answers import allowed_error, error_of
from smolctl.benchmark.contenders import open_weighted
from smolctl.benchmark.jobs import Entry, choose_suites, expected_answers, make_jobs, prepare
from smolctl.benchmark.limits import LimitMeter, Limits, roofline
from smolctl.benchmark.lineup import check_peers, line_up
from smolctl.benchmark.machine import (
    CpuTimes,
    cpu_times,
    describe_machine,
    disturbance,
    load_average,
    load_between,
)
from smolctl.benchmark.report import BenchReport, ModelFacts, Result, compare
from smolctl.benchmark.work import BATCH, Measured
from smolctl.timing import Spread, in_turns

REPEATS = 7  # of six the smallest and the largest bound the median; one more makes the median a value
ABOVE_THE_LIMIT = (
    "above 100 % of the memory's rate the weights stay in the processor's cache; above that of the products "
    "they are faster than PyTorch's"
)
Note = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """What a call asks for."""

    suites: tuple[str, ...] = ()  # empty: all that the model has what they need
    schemes: tuple[str, ...] = ()  # of `quantize`, measured beside what is stored
    against: tuple[str, ...] = ()  # peers
    repeats: int = REPEATS
    threads: int | None = None  # None: PyTorch's number
    batch: int = BATCH  # sequences of batched decoding


def bench(model: str, options: BenchOptions, note: Note = lambda _text: None) -> BenchReport:
    """Measure a model on this machine.

    Args:
        model: any MODEL; one without weights, such as a preset, is measured with random ones.
        options: what, beside whom, how often.
        note: told what goes on, one line at a time.

    Raises:
        SmolError: the model cannot be read, a suite or a peer is not known, or ours cannot run.
    """
    average = load_average()  # before we add to it
    peers = check_peers(options.against)
    source = open_weighted(model)
    suites = choose_suites(source, options.suites)
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    machine = describe_machine(threads)
    meter, marks = LimitMeter(), list[CpuTimes | None]()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".smolctl-bench-") as name, ExitStack() as stack:
        lineup = line_up(source, options.schemes, peers, threads, Path(name))
        jobs = make_jobs(source, lineup.contenders, suites, options.batch, Path(name))
        note("the plain PyTorch network gives the answers that are expected")
        expected = expected_answers(jobs, source, threads)
        note(f"loading and warming up {', '.join(dict.fromkeys(job.contender.engine for job in jobs))}")
        entries, left_out = prepare(jobs, source, stack)
        processes = {entry.process for entry in entries}

        def after_round(number: int) -> None:
            meter.measure()
            marks.append(cpu_times(processes))
            note(f"round {number} of {options.repeats}")

        marks.append(cpu_times(processes))
        measured = in_turns([one.run for one in entries], options.repeats, 0, after_round)
    load, limits = load_between(marks[0], marks[-1], average), meter.limits()
    results = [
        result
        for entry, laps in zip(entries, measured, strict=True)
        for result in results_of(entry, laps, expected, limits)
    ]
    notes = [*lineup.left_out, *left_out, *(lap.lap.note for laps in measured for lap in laps)]
    if any((result.roofline_share or 0.0) > 1.0 for result in results):
        notes.append(ABOVE_THE_LIMIT)
    if machine.gpu:
        notes.append(f"everything ran on the CPU; the {machine.gpu} was not used")
    return BenchReport(
        machine=machine,
        load=load,
        disturbed=disturbance(load, machine.logical_cpus),
        limits=limits,
        model=ModelFacts.of(model, source.require_config()),
        repeats=options.repeats,
        results=tuple(results),
        comparisons=compare(results),
        notes=tuple(dict.fromkeys(note for note in notes if note)),
    )


def results_of(
    entry: Entry, measured: Sequence[Measured], expected: Mapping[str, Tensor], limits: Limits
) -> list[Result]:
    """A result for each part of a job; none where a repeat could not be measured.

    The answer of every repeat is compared with the expected one, and the worst of them counts.
    """
    job, contender = entry.job, entry.job.contender
    if any(one.lap.note for one in measured):
        return []
    precision = entry.facts.precision
    peaks = [one.peak_bytes for one in measured if one.peak_bytes is not None]
    error = max(error_of(job.kind, one.lap.answer, expected[job.kind]) for one in measured)
    found = []
    for index, part in enumerate(entry.parts):
        seconds = [one.lap.seconds[index] for one in measured]
        values = tuple(part.value(one) for one in seconds)
        spread, roof = Spread.of(values), roofline(part.cost, Spread.of(seconds).median, limits)
        found.append(
            Result(
                suite=part.suite,
                model=contender.model,
                engine=contender.engine,
                precision=precision,
                build=entry.facts.engine,
                work=part.work,
                unit=part.unit,
                values=values,
                median=spread.median,
                min=spread.low,
                max=spread.high,
                peak_rss_bytes=max(peaks) if peaks else None,
                roofline_share=roof.share if roof else None,
                limit=roof.limit if roof else None,
                answer_error=error,
                allowed_error=allowed_error(job.kind, precision),
                rival_of=contender.rival_of,
            )
        )
    return found
