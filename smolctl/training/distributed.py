"""Communication between the processes of one run. With a single process, none of it has a cost."""

from __future__ import annotations

import functools
import io
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from smolctl.config import RunConfig
from smolctl.errors import InputError, SmolError, UsageError
from smolctl.training.device import process_count
from smolctl.training.lightning import SLURMEnvironment, pl, rank_zero_only

T = TypeVar("T")

# How long the first process waits for the others to start, and they for it: machines boot at different
# speeds.
PATIENCE = timedelta(minutes=5)
# Environment variables in which launchers other than torchrun and SLURM store the number of processes.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")
SHARE = (
    "Every machine needs the same config, data and, to resume, run folder at the same paths: "
    "put them into a folder that all machines share."
)


def is_main_process() -> bool:
    """Whether this process keeps the records; known from the environment before anything is set up.

    Lightning, torchrun and SLURM start the same command once for every device.
    """
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def gather(value: T, trainer: pl.Trainer) -> list[T]:
    """The values of all processes, in the order of their ranks, on each process: tensors and plain data."""
    if trainer.world_size == 1:
        return [value]
    packed = io.BytesIO()
    torch.save(value, packed)  # all_gather_object fails on tensors of bytes in PyTorch 2.13
    received: list[bytes] = [b""] * trainer.world_size
    torch.distributed.all_gather_object(received, packed.getvalue())
    return [torch.load(io.BytesIO(content), weights_only=True) for content in received]


def largest(value: int, trainer: pl.Trainer) -> int:
    """The largest value of all processes, on each of them."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(tensor, reduce_op="max"))


def from_main(value: T, trainer: pl.Trainer) -> T:
    """The main process's value, on all processes."""
    return value if trainer.world_size == 1 else trainer.strategy.broadcast(value)


# Processes started by torchrun or SLURM


@dataclass(frozen=True)
class Launch:
    """The processes that torchrun or SLURM started."""

    launcher: str
    rank: int
    world_size: int
    num_nodes: int

    @property
    def devices(self) -> int:
        """Processes per machine."""
        return self.world_size // self.num_nodes


def launch() -> Launch | None:
    """How torchrun or SLURM started this process; None if Lightning starts the other processes, if there are
    any.

    Raises:
        UsageError: SLURM does not state how many processes each machine has.
    """
    environment = os.environ
    if torch.distributed.is_torchelastic_launched():
        size = int(environment["WORLD_SIZE"])
        nodes = size // int(environment["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", int(environment["RANK"]), size, nodes)
    if SLURMEnvironment.detect():
        size, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", 1))
        if size > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
            raise UsageError(
                f"SLURM started {size} processes and does not say how many on each machine",
                "Give sbatch or srun --ntasks-per-node in place of --ntasks.",
            )
        return Launch("SLURM", int(environment.get("SLURM_PROCID", 0)), size, nodes)
    return None


def with_process_counts(config: RunConfig) -> RunConfig:
    """The config with the numbers of devices and machines for which torchrun or SLURM started processes.

    Raises:
        UsageError: the numbers contradict each other, so that several runs would start instead of one, or
            none.
    """
    trainer, started = config.trainer, launch()
    asked = f"--devices {trainer.devices} --num-nodes {trainer.num_nodes}"
    if started is None:
        _require_no_other_launcher(config, asked)
        return config
    counts = {"devices": started.devices, "num_nodes": started.num_nodes}
    if (trainer.devices, trainer.num_nodes) not in ((1, 1), ("auto", 1), tuple(counts.values())):
        raise UsageError(
            f"{started.launcher} started {_count(started.world_size, 'process', 'processes')} on "
            f"{_count(started.num_nodes, 'machine', 'machines')}, which is not {asked}",
            f"Leave both options out, or give --devices {started.devices} --num-nodes {started.num_nodes}.",
        )
    return config.model_copy(update={"trainer": trainer.model_copy(update=counts)})


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _require_no_other_launcher(config: RunConfig, asked: str) -> None:
    environment, hint = (
        os.environ,
        "Start it with torchrun or srun; the documentation on several devices shows how.",
    )
    if config.trainer.num_nodes > 1:
        raise UsageError(f"{asked}: only torchrun and SLURM can start a run on several machines", hint)
    processes = str(process_count(config))
    for name in SIZES:
        if environment.get(name, processes) != processes:
            raise UsageError(f"{name}={environment[name]} and {asked} contradict each other", hint)
    if environment.get("NODE_RANK", "0") != "0":
        raise UsageError(
            f"NODE_RANK={environment['NODE_RANK']} names another machine, but nothing else describes it",
            f"Unset it to train on this machine alone. {hint}",
        )


@functools.cache
def _store() -> Store | None:
    """A store for messages between processes that cannot exchange tensors yet; None for a single process.

    Raises:
        SmolError: the other processes did not start in time.
    """
    started = launch()
    if started is None or started.world_size == 1:
        return None
    if started.launcher == "SLURM":
        slurm = SLURMEnvironment()
        _ = slurm.main_address, slurm.main_port  # both write it into the environment
    try:
        found = rendezvous("env://", started.rank, started.world_size, timeout=PATIENCE)
        store: Store = next(found)[0]
    except torch.distributed.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise SmolError(
            f"the {started.world_size} processes of the run did not connect at {address}",
            "Start all of them within five minutes, on machines that can reach this address.",
        ) from error
    return store


@contextmanager
def failing_together() -> Iterator[None]:
    """A failure inside also ends the other processes while they wait in `wait_for_all`."""
    store = _store()
    try:
        yield
    except BaseException as error:
        if store is not None:
            with suppress(torch.distributed.DistError):
                message = f"{_name()}: {str(error) or type(error).__name__}"
                store.compare_set("smolctl/failure", "", message)  # the first failure is the cause
        raise


def wait_for_all(identity: Mapping[str, Any]) -> None:
    """Wait until all processes are ready to train, on the same data and from the same step.

    Args:
        identity: what must be the same in every process; plain values.

    Raises:
        InputError: another process has failed, or this one's identity differs from that of the first.
    """
    started, store = launch(), _store()
    if started is None or store is None:
        return
    mine = json.dumps(identity, sort_keys=True)  # noqa: TID251 - to be compared
    if started.rank == 0:
        store.set("smolctl/identity", mine)
    _wait(store, lambda: store.check(["smolctl/identity"]))
    first = json.loads(store.get("smolctl/identity"))  # noqa: TID251 - from this run's first process
    if different := [name for name in identity if identity[name] != first.get(name)]:
        raise InputError(f"{_name()} has another {' and '.join(different)} than the first process", SHARE)
    store.add("smolctl/ready", 1)
    _wait(store, lambda: store.add("smolctl/ready", 0) == started.world_size)


def _wait(store: Store, condition: Callable[[], bool]) -> None:
    while True:
        try:
            if store.check(["smolctl/failure"]):
                failure = store.get("smolctl/failure").decode()
                raise InputError(failure, SHARE)
            if condition():
                return
        except torch.distributed.DistError as error:
            raise InputError("the first process of the run has ended; its output says why", SHARE) from error
        time.sleep(0.2)


def _name() -> str:
    return f"process {getattr(launch(), 'rank', 0)} on {platform.node()}"
