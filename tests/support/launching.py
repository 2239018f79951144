"""Processes of one run, started as torchrun and SLURM start them."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

from tests.support.processes import Called, start


def under_torchrun(
    *arguments: object, size: int, folders: tuple[str | Path, ...] = (".",)
) -> list[subprocess.Popen[str]]:
    """The `size` processes of a command on as many machines as folders are given, each working in its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = size // len(folders)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    processes = []
    for rank in range(size):
        own = {"RANK": rank, "LOCAL_RANK": rank % here, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": here}
        environment = {**os.environ, **{name: str(value) for name, value in (common | own).items()}}
        processes.append(start(*arguments, env=environment, cwd=folders[rank // here]))
    return processes


def under_slurm() -> dict[str, str]:
    """The environment of the only task of a job."""
    counts = dict.fromkeys(("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES"), "1")
    ranks = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    return {**os.environ, "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", **counts, **ranks}


def ends(processes: list[subprocess.Popen[str]], timeout: float = 60) -> list[Called]:
    """What the processes did; none of them outlives this."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Called(process.returncode, *both) for process, both in zip(processes, said, strict=True)]
