"""Shell completion: models, runs and their steps, names, and the keys of --set.

The functions return values that Typer filters by the typed prefix. None of them imports PyTorch or reads a
model, because the shell waits for them. If nothing matches, the shell completes file names.
"""

from __future__ import annotations

import io
import os
import re
import typing
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal

from smolctl.durable import named_path

Completer = Callable[[str], list[str]]

# The library's own lists require importing PyTorch; tests/cli/test_completion.py compares them.
SCHEMES = (
    *("int8", "int4", "int8-dynamic", "bf16", "gguf-bf16", "gguf-f16", "gguf-q8_0", "gguf-q5_1"),
    *("gguf-q5_0", "gguf-q4_1", "gguf-q4_0"),
)
GGUF_SCHEMES = ("f32", *(name.removeprefix("gguf-") for name in SCHEMES if name.startswith("gguf-")))
SUITES = ("load", "prefill", "decode", "batch", "train", "tokenize", "checkpoint")
PEERS = ("transformers", "llama.cpp", "litgpt")
LOGGERS = ("csv", "tensorboard", "wandb", "trackio", "none")
DTYPES = ("float32", "bfloat16", "float16", "bf16-mixed", "16-mixed")

MODEL_FILES = {".gguf", ".safetensors", ".ckpt"}
CONFIG_FILES = {".yaml", ".yml"}
# Variables with which Typer's shell scripts request completions and pass the words of the line.
ASKED, BASH_WORDS, BASH_WORD, OTHER_WORDS = (
    "_SMOLCTL_COMPLETE",
    "COMP_WORDS",
    "COMP_CWORD",
    "_TYPER_COMPLETE_ARGS",
)
BREAK = re.compile("[@=:]+")


@contextmanager
def answering(environ: MutableMapping[str, str] = os.environ) -> Iterator[str]:
    """Convert the words of a line completed by bash to a form that Typer understands.

    Bash splits words at `@`, `=` and `:`, which occur in runs and settings, and replaces only what follows
    them. Here the words are joined while Typer works, and the part that bash keeps is removed from its
    results.

    Yields:
        The command of the line; empty if no shell requests completions, or there is no command yet.
    """
    if environ.get(ASKED) != "complete_bash":
        yield (environ.get(OTHER_WORDS, "").split()[1:2] or [""])[0]
        return
    words = environ[BASH_WORDS].split("\n")
    words = [*words, ""][: int(environ[BASH_WORD]) + 1]
    whole, joins = [""], False
    for word in words:
        is_break = BREAK.fullmatch(word) is not None
        whole = [*whole[:-1], whole[-1] + word] if is_break or joins else [*whole, word]
        joins = is_break
    environ.update({BASH_WORDS: "\n".join(whole[1:]), BASH_WORD: str(len(whole) - 2)})
    typed = re.sub("^--[^=]*=", "", whole[-1])  # Typer handles --option=value itself
    kept = len(typed) - len(BREAK.sub("", words[-1])) if len(whole) - 1 < len(words) else 0
    try:
        with redirect_stdout(io.StringIO()) as answers:
            yield (whole[2:3] or [""])[0]
    finally:
        print("\n".join(line[kept:] for line in answers.getvalue().splitlines()))


def names(*values: str) -> Completer:
    """Completes names; in a comma-separated list, the last one."""

    def complete(incomplete: str) -> list[str]:
        before = incomplete[: incomplete.rfind(",") + 1]
        return [before + value for value in values]

    return complete


def complete_run(incomplete: str) -> list[str]:
    """Runs, and after an `@` the steps of one."""
    return _runs(incomplete)


def complete_weights(incomplete: str) -> list[str]:
    """Models with weights: runs and files."""
    return [*_runs(incomplete), *_files(incomplete, MODEL_FILES)]


def complete_model(incomplete: str) -> list[str]:
    """All models with a config: presets, runs and files."""
    files = _files(incomplete, MODEL_FILES | CONFIG_FILES)
    return [*_presets(), *_runs(incomplete), *files]


def complete_config(incomplete: str) -> list[str]:
    """Configs for training: presets and files."""
    return [*_presets(), *_files(incomplete, CONFIG_FILES)]


def complete_license(incomplete: str) -> list[str]:
    """License identifiers of the Hub."""
    from smolctl.publish.licenses import LICENSES

    return sorted(LICENSES)


def complete_run_setting(incomplete: str) -> list[str]:
    """The keys of a run's config."""
    from smolctl.config import RunConfig

    return _settings(RunConfig, incomplete)


def complete_model_setting(incomplete: str) -> list[str]:
    """The keys of a model's config."""
    from smolctl.config import ModelConfig

    return _settings(ModelConfig, incomplete)


def _presets() -> list[str]:
    from smolctl.config.load import preset_names

    return preset_names()


def _files(typed: str, suffixes: set[str]) -> list[str]:
    folder = typed[: typed.rfind("/") + 1]
    found = _inside(named_path(folder))
    return [f"{folder}{path.name}" for path in found if path.suffix in suffixes and path.is_file()]


def _runs(typed: str) -> list[str]:
    from smolctl.runs.folder import RunFolder
    from smolctl.runs.layout import is_run
    from smolctl.runs.reference import BEST
    from smolctl.runs.root import RUNS

    name, at, _ = typed.rpartition("@")
    if at:
        run = RunFolder(named_path(name))
        return [f"{name}@{step}" for step in (BEST, *(file.step for file in run.checkpoints()))]
    folders = dict.fromkeys((f"{RUNS}/", typed[: typed.rfind("/") + 1]))
    return [
        f"{folder}{path.name}" for folder in folders for path in _inside(named_path(folder)) if is_run(path)
    ]


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _settings(schema: Any, typed: str) -> list[str]:
    """`section.key=` for every setting; if only one matches, also with its possible values."""
    fitting = {
        key: values for key, values in _leaves(schema).items() if f"{key}=".startswith(typed[: len(key) + 1])
    }
    keys = [f"{key}=" for key in fitting]
    if len(fitting) > 1:
        return keys
    return keys + [f"{key}={value}" for key, values in fitting.items() for value in values]


def _leaves(schema: Any) -> dict[str, list[str]]:
    """The keys below a pydantic model, each with its choices or a numeric default."""
    from smolctl.config.load import settings_of

    leaves: dict[str, list[str]] = {}
    for name, field in settings_of(schema):
        annotation = field.annotation
        choices = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
        if annotation is bool:
            choices = (True, False)
        elif not choices and isinstance(field.default, int | float):
            choices = (field.default,)
        leaves[name] = [str(value).lower() if isinstance(value, bool) else str(value) for value in choices]
    return leaves
