"""Valid files of every kind, made once, of which each damaged input is a copy; and what is done with one."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from typer.main import get_command

from smolctl.arithmetic import parameter_rows
from smolctl.cli.main import application
from smolctl.config import ModelConfig, RunConfig
from smolctl.evaluation.task_record import record_tasks
from smolctl.runs.environment import write_environment
from smolctl.runs.events import Candidate, Prediction, Step, Validation
from smolctl.runs.folder import RunFolder
from smolctl.runs.layout import ENVIRONMENT
from smolctl.sources.huggingface.config import to_huggingface_config
from tests.fuzz.mutation import as_json, broken, mutated
from tests.support.gguf_files import write_gguf
from tests.support.tiny_models import TEMPLATE, tiny_tokenizer

CHAT = [{"role": "user", "content": "hi"}]
Act = Callable[[], object]


@functools.cache
def base() -> Path:
    """A folder of valid inputs, made once, by a child: threads that it starts stay in it."""
    folder = Path(tempfile.mkdtemp(prefix="smolctl-fuzz-base-"))
    atexit.register(shutil.rmtree, folder, True)
    if (child := os.fork()) == 0:
        _make_base(folder)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return folder


@functools.cache
def random_weights() -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A tiny model, made without the network, whose first one takes PyTorch a second."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModelConfig.model_validate(
        {
            **{"num_key_value_heads": 2, "max_position_embeddings": 96, "eos_token_id": 2, **sizes},
            **{"vocab_size": 320, "position_embedding": "rope", "residual_scale": 1.0},
        }
    )
    chance = torch.Generator().manual_seed(0)
    rows = [row for row in parameter_rows(config) if not row.tied]
    return config, {f"{row.module}.weight": torch.randn(row.shape, generator=chance) for row in rows}


def _make_base(folder: Path) -> None:
    config, state = random_weights()
    files, model = tiny_tokenizer(), folder / "model"
    model.mkdir()
    save_file(state, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text(json.dumps(to_huggingface_config(config)))
    (model / "tokenizer.json").write_text(files.backend.to_str())
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": [0, 2]}')
    (model / "tokenizer_config.json").write_text(
        json.dumps(
            {"eos_token": "<|im_end|>", "bos_token": {"content": "<|endoftext|>"}, "chat_template": "x"}
        )
    )
    sharded = Path(shutil.copytree(model, folder / "sharded"))
    (sharded / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, inside in parts.items():
        save_file({name: state[name] for name in inside}, sharded / file)
    places = {name: file for file, inside in parts.items() for name in inside}
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    )
    metadata = {
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [files.token(i) or f"<{i}>" for i in range(config.vocab_size)],
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in json.loads(files.backend.to_str())["model"]["merges"]
        ],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    write_gguf(folder / "model.gguf", config, state, metadata=metadata)
    with_run(folder / "run")
    command("quantize", model, "--to", "int8", "--no-measure", "--out", folder / "int8", "-q")()


def with_run(run: Path) -> None:
    """A run folder with the records of a few steps, and no checkpoint."""
    run.mkdir()
    folder = RunFolder(run)
    folder.write_config(RunConfig())
    write_environment(
        folder.path / ENVIRONMENT,
        {
            "device": "cpu",
            "devices": [],
            "threads": 2,
            "packages": {"torch": "2"},
            "data": ["a"],
            "earlier": [],
        },
    )
    for step in range(1, 6):
        folder.record(Step(step, 3.0 / step, 1e-3, 1.0, 10 * step, 0.1, 100.0, 1.0, 10**9, None))
        folder.record(Prediction(step, "a", "b", 1.0, (Candidate("c", 0.5),)))
    folder.record(Validation(5, 1.5, 0.1, 2.0))
    (run / "quantized").mkdir()
    variant = {"scheme": "int8", "step": 5, "bytes": 10, "bits_per_weight": 8.0, "verdict": "fine"}
    (run / "quantized" / "verdict.json").write_text(json.dumps({"variants": [variant]}))
    metric = {"name": "acc", "filter": "none", "value": 0.5, "standard_error": None}
    asked = {"shots": 0, "items": 8, "limit": None, "chat": False, "step": 5, "lm_eval": "0.4.13"}
    record_tasks(run, [{"task": "quiz", "version": "1.0", **asked, "metrics": [metric]}])


@functools.cache
def built_application() -> Any:
    """The command line, built once: Typer takes longer for that than most commands here."""
    return get_command(application())


def command(*arguments: object) -> Act:
    """A command of smolctl, whose errors come out as they are."""

    def act() -> None:
        try:
            built_application()([*map(str, arguments), "--debug"], standalone_mode=False)
        except Exception as error:
            if not hasattr(error, "format_message"):  # Typer's usage errors
                raise

    return act


def sampled(model: Path, *more: str) -> tuple[Act, ...]:
    """What `sample` and the commands that only look make of a model."""
    sample = command("sample", model, "--prompt", "the cat", "--max-tokens", "2", *more)
    return command("inspect-config", model, "--json"), command("inspect-config", model), sample


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(base() / name, folder / name))


def changed_json(chance: random.Random, path: Path) -> None:
    """Change a JSON file: its values, and now and then its bytes."""
    content = as_json(mutated(chance, json.loads(path.read_text())))
    path.write_bytes(broken(chance, content) if chance.random() < 0.15 else content)
