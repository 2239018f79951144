"""The work of an engine's process: it prepares a workload once and runs it on request."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cache
from pathlib import Path

from smolctl.benchmark.engines import open_engine
from smolctl.benchmark.file_suites import checkpoint, load, tokenize
from smolctl.benchmark.inference_suites import decode, prefill
from smolctl.benchmark.training_suite import train
from smolctl.benchmark.workload import EngineFacts, Measurement, Run, Workload
from smolctl.generation.engine import Engine
from smolctl.timing import peak_memory

loaded_engine = cache(open_engine)  # shared by the suites that need a loaded engine
WITH_ENGINE = {"prefill": prefill, "decode": decode, "batch": decode}
WITHOUT_ENGINE = {"load": load, "train": train, "tokenize": tokenize, "checkpoint": checkpoint}


def prepare(workload: Workload) -> EngineFacts:
    """Load everything that a workload needs.

    Raises:
        Exception: whatever the engine raises.
    """
    return _prepared(workload)[0]


def run(workload: Workload) -> Measurement:
    """Run a workload once, and report the peak memory of the process during the run."""
    measure = _prepared(workload)[1]
    with contextlib.suppress(OSError):  # if not supported, the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the current size
    return replace(measure(), peak_bytes=peak_memory())


@cache
def _prepared(workload: Workload) -> tuple[EngineFacts, Run]:
    if workload.suite in WITH_ENGINE:
        engine = loaded_engine(workload.engine)
        return facts_of(engine), WITH_ENGINE[workload.suite](engine, workload)
    measure = WITHOUT_ENGINE[workload.suite](workload)
    facts = facts_of(open_engine(workload.engine)) if workload.suite == "load" else EngineFacts()
    return facts, measure


def facts_of(engine: Engine) -> EngineFacts:
    """What an engine reports about itself."""
    return EngineFacts(engine.name, engine.precision, engine.weight_bytes)
