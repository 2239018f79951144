"""One call of `bench`: its engines and workloads, the measurements in turns, and the results."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smolctl.benchmark.correctness import allowed_error, error_of
from smolctl.benchmark.engine_files import check_peers, make_engine_files
from smolctl.benchmark.engines import open_weighted
from smolctl.benchmark.limits import HardwareLimits, LimitMeter, limits_of, roofline
from smolctl.benchmark.machine import cpu_times, describe_machine, disturbance, load_average, load_between
from smolctl.benchmark.report import BenchReport, ModelFacts, Result, compare
from smolctl.benchmark.suites import (
    PreparedWorkload,
    choose_suites,
    expected_outputs,
    make_workloads,
    prepare,
)
from smolctl.benchmark.workload import BATCH, Measurement
from smolctl.cores import compute_threads
from smolctl.durable import is_writable
from smolctl.timing import Spread, in_turns

REPEATS = 7  # with six, the median's interval is the whole range; a seventh makes the median a value
ABOVE_THE_LIMIT = (
    "above 100 % of the memory bandwidth, the weights stay in the processor's cache; above 100 % of the "
    "matmul rate the engine's matmuls are faster than PyTorch's"
)


@dataclass(frozen=True)
class BenchOptions:
    """Options of a call."""

    suites: tuple[str, ...] = ()  # empty: every one that the model supports
    schemes: tuple[str, ...] = ()  # of `quantize`, measured in addition to the stored weights
    against: tuple[str, ...] = ()  # peers
    repeats: int = REPEATS
    threads: int | None = None  # see `compute_threads`
    batch: int = BATCH  # sequences of batched decoding


def bench(
    model: str, options: BenchOptions, progress: Callable[[str], None] = lambda _line: None
) -> BenchReport:
    """Measure a model on this machine.

    Args:
        model: any MODEL; one without weights, such as a preset, is measured with random ones.
        options: what to measure, against which peers, and how often.
        progress: called with a line of text at every stage.

    Raises:
        SmolError: the model cannot be read, a suite or a peer is not known, or smolctl's own engine cannot
            run.
    """
    average = load_average()  # before this process adds to it
    peers = check_peers(options.against)
    source = open_weighted(model)
    suites = choose_suites(source, options.suites)
    threads = compute_threads(options.threads)
    torch.set_num_threads(threads)
    machine = describe_machine(threads)
    meter = LimitMeter()
    # On the disk of the working folder, if possible: folders for temporary files are often in memory.
    place = Path.cwd() if is_writable(Path.cwd()) else Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(dir=place, prefix=".smolctl-bench-") as name, ExitStack() as stack:
        engines, left_out = make_engine_files(source, options.schemes, peers, threads, Path(name))
        workloads = make_workloads(source, engines, suites, options.batch, Path(name))
        progress("computing the expected outputs with the plain PyTorch network")
        expected = expected_outputs(workloads, source, threads)
        progress(f"loading and warming up {', '.join(dict.fromkeys(one.engine.engine for one in workloads))}")
        prepared, left_out_of_suites = prepare(workloads, source, stack)
        processes = {one.process for one in prepared}

        def after_round(number: int) -> None:
            meter.measure()
            progress(f"round {number} of {options.repeats}")

        before = cpu_times(processes)
        measured = in_turns([one.run for one in prepared], options.repeats, 0, after_round)
        load = load_between(before, cpu_times(processes), average)
    limits = limits_of(meter.rounds)
    results = [
        result
        for one, measurements in zip(prepared, measured, strict=True)
        for result in results_of(one, measurements, expected, limits)
    ]
    notes = [*left_out, *left_out_of_suites, *(one.note for measurements in measured for one in measurements)]
    if place != Path.cwd() and {"load", "checkpoint"} & set(suites):
        notes.append(f"the working folder cannot be written: files were measured in {place}")
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
    prepared: PreparedWorkload,
    measurements: Sequence[Measurement],
    expected: Mapping[str, Tensor],
    limits: HardwareLimits,
) -> list[Result]:
    """A result for each metric of a workload; none if a repeat could not be measured.

    The output of every repeat is compared with the expected one, and the largest error counts.
    """
    suite, spec = prepared.workload.suite, prepared.workload.engine
    if any(one.note for one in measurements):
        return []
    precision = prepared.facts.precision
    peaks = [one.peak_bytes for one in measurements if one.peak_bytes is not None]
    error = max(error_of(suite, one.output, expected[suite]) for one in measurements)
    found = []
    for index, metric in enumerate(prepared.metrics):
        seconds = [one.seconds[index] for one in measurements]
        values = tuple(metric.value(one) for one in seconds)
        spread = Spread.of(values)
        share, limit = roofline(metric.cost, Spread.of(seconds).median, limits)
        found.append(
            Result(
                suite=metric.name,
                model=spec.model,
                engine=spec.engine,
                precision=precision,
                build=prepared.facts.name,
                work=metric.work,
                unit=metric.unit,
                values=values,
                median=spread.median,
                min=spread.low,
                max=spread.high,
                peak_rss_bytes=max(peaks) if peaks else None,
                roofline_share=share,
                limit=limit,
                answer_error=error,
                allowed_error=allowed_error(suite, precision),
                rival_of=spec.rival_of,
            )
        )
    return found
