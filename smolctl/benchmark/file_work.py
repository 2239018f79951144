"""Work with files: loading a model, saving and reading a checkpoint; and cutting text into tokens."""

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

from smolctl.benchmark.contenders import PEERS, Contender, open_engine, plain_network
from smolctl.benchmark.work import Job, Lap, Work
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import SmolError
from smolctl.sources import open_source
from smolctl.training.optim.optimizers import make_optimizer

# Of its files that a cold load reads from the disk at least: two thirds of a checkpoint are the optimizer's.
SHARE_READ = 0.2
NOT_COLD = "the system kept the file in memory: a cold load could not be measured here"


def load(job: Job) -> Work:
    """Open the model and read one token: by then every weight has been touched."""

    contender = replace(job.contender, model=job.cold_copy or job.contender.model)
    config = open_source(contender.model).config if contender.engine in PEERS else None

    def run() -> Lap:
        gc.collect()  # an engine of the last repeat would keep its file in memory
        cold = not job.cold_copy or forget(job.files)
        read_before = bytes_from_disk()
        started = time.perf_counter()
        engine = open_engine(contender, config)
        logits = engine.forward([[job.text[0][0]]], engine.allocate(1, 1))
        seconds = time.perf_counter() - started
        if job.cold_copy and cold and read_before is not None:
            size = sum(Path(file).stat().st_size for file in job.files)
            cold = (bytes_from_disk() or 0) - read_before > SHARE_READ * size
        return Lap((seconds,), logits.clone(), "" if cold else NOT_COLD)

    return run


def forget(files: Sequence[str]) -> bool:
    """Ask the system to drop the pages of files from its memory; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        with Path(file).open("rb") as opened:
            os.fsync(opened.fileno())  # pages that are not on the disk yet would stay
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def bytes_from_disk() -> int | None:
    """What this process has had read from storage so far; None where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def checkpoint(job: Job) -> Work:
    """Save weights and optimizer state as a run does, and read them back.

    Saving writes, syncs, reads back, compares checksums and renames. Reading finds the file in memory.
    """
    # Lightning, behind these, takes seconds to import; no other work waits for it.
    from smolctl.runs.checkpoint_file import read_checkpoint
    from smolctl.training.checkpoint import DurableCheckpointIO

    network = plain_network(job.contender.model)
    optimizer = make_optimizer(network, job.optimizer)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its state
    optimizer.zero_grad(set_to_none=True)
    content: dict[str, Any] = {
        "state_dict": network.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
    }
    path, io = Path(job.folder) / "step.ckpt", DurableCheckpointIO()

    def run() -> Lap:
        started = time.perf_counter()
        io.save_checkpoint(content, path)
        saved = time.perf_counter()
        found = read_checkpoint(path)
        loaded = time.perf_counter()
        differing = sum(
            not torch.equal(tensor, found["state_dict"][name])
            for name, tensor in content["state_dict"].items()
        )
        return Lap((saved - started, loaded - saved), torch.tensor([float(differing)]))

    return run


def tokenize(job: Job) -> Work:
    """Cut a text into tokens, in documents of a few kilobytes on all cores, as a corpus is."""
    texts = [job.document[at : at + 4096] for at in range(0, len(job.document), 4096)]
    encode = _encoder(job.contender)

    def run() -> Lap:
        started = time.perf_counter()
        found = encode(texts)
        seconds = time.perf_counter() - started
        return Lap((seconds,), token_digest(found))

    return run


def _encoder(contender: Contender) -> Callable[[Sequence[str]], Sequence[Sequence[int]]]:
    if contender.engine == "transformers":
        from transformers import AutoTokenizer

        theirs: Any = AutoTokenizer.from_pretrained(contender.model)
        return lambda texts: theirs(list(texts), add_special_tokens=False)["input_ids"]
    files = open_source(contender.model).read_tokenizer()
    if files is None:
        raise SmolError(f"{contender.model}: there is no tokenizer beside the weights")
    tokenizer = Tokenizer.from_files(files, contender.model)
    if contender.engine == "reference":
        return lambda texts: [tokenizer.encode(text) for text in texts]
    return tokenizer.encode_batch


def token_digest(documents: Sequence[Sequence[int]]) -> Tensor:
    """Numbers that are equal for equal tokens: their count, and a hash in exact floats."""
    flat = ",".join(str(token) for document in documents for token in (*document, -1))
    digest = hashlib.sha256(flat.encode()).digest()
    return torch.tensor([sum(map(len, documents)), *digest[:8]], dtype=torch.float64)
