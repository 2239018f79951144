"""The suites load, checkpoint and tokenize, which measure files and text."""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolctl.benchmark.engines import PEERS, EngineSpec, open_engine, plain_network
from smolctl.benchmark.workload import Measurement, Run, Workload
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.sources import open_source
from smolctl.training.optim.optimizers import make_optimizer

# A cold load must read at least this share of the files from the disk: two thirds of a checkpoint are
# optimizer state.
SHARE_READ = 0.2
NOT_COLD = "the system kept the file in memory: a cold load could not be measured here"


def load(workload: Workload) -> Run:
    """Open the model and process one token, which reads every weight."""
    spec = replace(workload.engine, model=workload.cold_copy or workload.engine.model)
    config = open_source(spec.model).config if spec.engine in PEERS else None

    def run() -> Measurement:
        gc.collect()  # otherwise the engine of the last run keeps its file in memory
        cold = not workload.cold_copy or drop_from_page_cache(workload.files)
        read_before = bytes_from_disk()
        started = time.perf_counter()
        engine = open_engine(spec, config)
        logits = engine.forward([[workload.text[0][0]]], engine.allocate(1, 1))
        seconds = time.perf_counter() - started
        if workload.cold_copy and cold and read_before is not None:
            size = sum(Path(file).stat().st_size for file in workload.files)
            cold = (bytes_from_disk() or 0) - read_before > SHARE_READ * size
        return Measurement((seconds,), torch.from_numpy(logits), "" if cold else NOT_COLD)

    return run


def drop_from_page_cache(files: Sequence[str]) -> bool:
    """Ask the system to drop files from its page cache; False if that is not possible."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        with Path(file).open("rb") as opened:
            os.fsync(opened.fileno())  # pages that are not yet on the disk would stay in the cache
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def bytes_from_disk() -> int | None:
    """Bytes read from storage for this process so far; None if the system does not count them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def checkpoint(workload: Workload) -> Run:
    """Save weights and optimizer state as a run does, and read them back.

    Saving writes, syncs, reads back, compares checksums and renames. Reading is served from the page cache.
    """
    # Imported here because Lightning takes seconds to import and no other suite needs it.
    from smolctl.runs.checkpoint_file import read_checkpoint
    from smolctl.training.checkpoint import DurableCheckpointIO

    network = plain_network(workload.engine.model)
    optimizer = make_optimizer(network, workload.optimizer)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # creates the optimizer's state
    optimizer.zero_grad(set_to_none=True)
    content: dict[str, Any] = {
        "state_dict": network.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
    }
    path, io = Path(workload.folder) / "step.ckpt", DurableCheckpointIO()

    def run() -> Measurement:
        started = time.perf_counter()
        io.save_checkpoint(content, path)
        saved = time.perf_counter()
        found = read_checkpoint(path)
        loaded = time.perf_counter()
        differing = sum(
            not torch.equal(tensor, found["state_dict"][name])
            for name, tensor in content["state_dict"].items()
        )
        return Measurement((saved - started, loaded - saved), torch.tensor([float(differing)]))

    return run


def tokenize(workload: Workload) -> Run:
    """Tokenize a text in documents of a few kilobytes on all cores, like a corpus."""
    texts = [workload.document[at : at + 4096] for at in range(0, len(workload.document), 4096)]
    encode = _encoder(workload.engine)

    def run() -> Measurement:
        started = time.perf_counter()
        found = encode(texts)
        seconds = time.perf_counter() - started
        return Measurement((seconds,), token_digest(found))

    return run


def _encoder(spec: EngineSpec) -> Callable[[Sequence[str]], Sequence[Sequence[int]]]:
    if spec.engine == "transformers":
        from transformers import AutoTokenizer

        theirs: Any = AutoTokenizer.from_pretrained(spec.model)
        return lambda texts: theirs(list(texts))["input_ids"]
    tokenizer = Tokenizer.from_files(open_source(spec.model).require_tokenizer(), spec.model)
    if spec.engine == "reference":
        return lambda texts: [tokenizer.encode(text) for text in texts]
    return tokenizer.encode_batch


def token_digest(documents: Sequence[Sequence[int]]) -> Tensor:
    """Numbers that are equal for equal tokens: their count and a hash, stored exactly as floats."""
    flat = ",".join(str(token) for document in documents for token in (*document, -1))
    digest = hashlib.sha256(flat.encode()).digest()
    return torch.tensor([sum(map(len, documents)), *digest[:8]], dtype=torch.float64)
