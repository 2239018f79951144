"""`train`: a run from the first step to the last."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from smolctl.arithmetic import run_memory
from smolctl.durable import explaining_disk_errors
from smolctl.runs.events import Listener, RunPlan, Start
from smolctl.runs.folder import RunFolder
from smolctl.runs.root import RUNS
from smolctl.timing import resident_memory
from smolctl.training.device import describe_environment, process_count
from smolctl.training.distributed import is_main_process
from smolctl.training.fit import RunResult, fit
from smolctl.training.guards import explaining_memory_errors
from smolctl.training.plan import make_plan, measure_training_speed
from smolctl.training.prepare import Prepared
from smolctl.training.process import prepare_process


def plan_run(prepared: Prepared, disk: Path) -> RunPlan:
    """Estimate the cost of the next steps, measured on the run's first micro-batch.

    Args:
        prepared: the run.
        disk: folder for checkpoints; its free space is looked up.
    """
    config, done = prepared.config, prepared.first_step
    prepare_process(config.trainer.deterministic)
    device = config.trainer.accelerator
    sequences = max(1, config.micro_batch_size // process_count(config))
    held = (resident_memory() or 0) - run_memory(config).weights if device == "cpu" else 0
    with explaining_memory_errors(config.micro_batch_size):
        network = prepared.network.to(device)
        batch = prepared.dataset(0, process_count(config))[done][:sequences].to(device)
        speed = measure_training_speed(network, batch, config, prepared.document_end)
    if device == "cuda":  # processes on a CPU share its cores
        speed *= process_count(config)
    existing = next(path for path in (disk.absolute(), *disk.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    plan = make_plan(config, done, prepared.corpus, speed, free, device, sequences, max(0, held))
    facts = prepared.corpus.conversations
    return replace(plan, read=prepared.corpus.read, conversations=asdict(facts) if facts else None)


def train(prepared: Prepared, name: str, out: Path | None, force: bool, emit: Listener) -> RunResult:
    """Start a run in a new folder.

    Args:
        prepared: config, weights, tokenizer and tokens.
        name: of the config; names the folder when `out` is None.
        out: the run folder.
        force: replace the run that `out` holds.
        emit: gets every event.

    Raises:
        SmolError: with the cause; the checkpoints written so far are kept.
    """
    if not is_main_process():  # the main process keeps the records, and announces their folder
        return fit(prepared, RunFolder(out or RUNS), None, emit)
    plan = plan_run(prepared, out or RUNS)
    with explaining_disk_errors(out or RUNS):
        run = RunFolder.claim(name, out, force, prepared.reads, emit)
    with run.lock(emit):
        with explaining_disk_errors(run.path):
            environment = describe_environment(prepared.config, prepared.decisions, prepared.corpus.read)
            run.describe(prepared.config, environment, prepared.tokenizer.save)
        emit(Start(str(run.path), 0, prepared.config.train.steps, plan))
        return fit(prepared, run, None, emit)
