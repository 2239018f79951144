"""Runs of a tiny model on a tiny corpus, and what they leave behind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from smolctl.config import RunConfig
from smolctl.config.load import merge, resolve_run_config
from smolctl.errors import ExitCode
from smolctl.runs.checkpoint_file import read_checkpoint
from smolctl.runs.events import Event
from smolctl.runs.folder import RunFolder
from smolctl.training.prepare import Prepared, prepare
from smolctl.training.resume import ResumeOptions, resume
from smolctl.training.train import train

TINY: dict[str, Any] = {
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    },
    "tokenizer": "train:300",
    "data": {"sequence_length": 32, "validation_fraction": 0.2},
    "train": {"steps": 15, "batch_size": 4, "micro_batch_size": 2},
    "optimizer": {"learning_rate": 3e-3},
    "schedule": {"warmup_steps": 4, "decay_start": 12, "decay_steps": 10},
    "checkpoint": {"every": 5, "keep_last": 0},
    "predictions": {"every": 5, "prompts": ["the cat", "a"], "max_tokens": 5},
    "validation": {"every": 5, "sequences": 4},
}


ROPE = {"position_embedding": "rope", "residual_scale": 1.0}
# Six steps, with everything that a run does now and then done every second step.
SHORT: dict[str, Any] = {
    "train": {"steps": 6},
    **{part: {"every": 2} for part in ("checkpoint", "predictions", "validation")},
}


def write_corpus(folder: Path) -> Path:
    """Thirty small documents of a few invented words."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "birds", "fly", "over", "trees"]
    chance = random.Random(0)
    folder.mkdir()
    for number in range(30):
        text = " ".join(chance.choice(words) for _ in range(120))
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


def write_project(folder: Path, **changes: Any) -> None:
    """corpus/, and tiny.yaml: the tiny run with some settings changed, for the command line."""
    write_corpus(folder / "corpus")
    config = merge(merge(TINY, {"data": {"source": "corpus"}}), changes)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))


def tiny_config(corpus: Path, **changes: Any) -> RunConfig:
    """The config of the tiny run on a corpus, with some settings changed."""
    values = merge(merge(TINY, {"data": {"source": str(corpus)}}), changes)
    return resolve_run_config(values, "test")


def prepare_tiny(corpus: Path, **changes: Any) -> Prepared:
    return prepare(tiny_config(corpus, **changes), None, lambda _event: None)


def run(prepared: Prepared, out: str, events: list[Event] | None = None) -> Path:
    result = train(
        prepared, "tiny", Path(out), force=False, emit=(events if events is not None else []).append
    )
    assert result.exit_code == ExitCode.DONE
    return result.folder


def make_workshop(folder: Path) -> None:
    """Two finished tiny runs: learned positions, and a Llama."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_corpus(folder / "corpus")
        run(prepare_tiny(folder / "corpus"), "runs/learned")
        run(prepare_tiny(folder / "corpus", model=ROPE), "runs/llama")


def go_on(folder: Path, **options: Any) -> list[Event]:
    events: list[Event] = []
    resume(folder, ResumeOptions(**options), events.append)
    return events


def state(folder: Path, step: int) -> dict[str, Any]:
    return read_checkpoint(RunFolder(folder).checkpoint_path(step), mmap=False)


def losses(folder: Path) -> list[tuple[int, float, float, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        (line["step"], line["loss"], line["learning_rate"], line["gradient_norm"])
        for line in lines
        if line["event"] == "step"
    ]


def assert_same(one: Any, two: Any, path: str = "") -> None:
    """Equal bit for bit, through nested dicts and lists."""
    assert type(one) is type(two), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype, path
        assert torch.equal(one, two), path
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_same(one[key], two[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), path
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    else:
        assert one == two, path


def assert_same_run(one: Path, two: Path, step: int = 15, but: str = "") -> None:
    """Equal bit for bit up to a step, but for one thing that a checkpoint keeps beside the training."""
    first, second = state(one, step), state(two, step)
    for content in (first, second):
        for name in ("tokens", but):  # tokens: where they lie in the cache
            content["smolctl"].pop(name, None)
    for part in ("state_dict", "optimizer_states", "smolctl", "global_step"):
        assert_same(first[part], second[part], part)
    assert losses(one) == losses(two)
    assert [loss[0] for loss in losses(one)] == list(range(1, step + 1))


def with_steps(steps: int) -> dict[str, Any]:
    return {"train": {"steps": steps}}
