"""What a shell offers after TAB, asked as the shells' scripts ask."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from smolctl.arithmetic import TRAINING_DTYPES
from smolctl.benchmark.bench import BenchOptions
from smolctl.benchmark.engines import PEERS
from smolctl.benchmark.suites import SUITES
from smolctl.cli import completion
from smolctl.config import RunConfig
from smolctl.config.load import preset_names
from smolctl.config.run import TrainerConfig
from smolctl.evaluation.compare import CompareOptions
from smolctl.generation.engines import EngineOptions
from smolctl.publish.push import PushOptions
from smolctl.quantization.quantize import QuantizeOptions
from smolctl.quantization.schemes import SCHEMES, SchemeOptions
from smolctl.serving.guards import Limits
from smolctl.serving.serve import ServeOptions
from smolctl.sources.gguf import write as gguf
from tests.support.processes import Smolctl

ASK = "_SMOLCTL_COMPLETE"


@pytest.fixture(autouse=True)
def _two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nano-001", "nano-002"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    for step in (100, 150):
        (tmp_path / f"runs/nano-001/checkpoints/step-{step:06d}.ckpt").touch()
    for name in ("mine.yaml", "model.gguf", "notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


def fish(smolctl: Smolctl, patch: pytest.MonkeyPatch, line: str) -> list[str]:
    """What fish is given for a line; zsh is given the same in another form."""
    patch.setenv(ASK, "complete_fish")
    patch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    patch.setenv("_TYPER_COMPLETE_ARGS", f"smolctl {line}")
    return [answer.partition("\t")[0] for answer in smolctl().out.split("\n") if answer]


def bash(smolctl: Smolctl, patch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """What bash is given for words that it has split itself."""
    patch.setenv(ASK, "complete_bash")
    patch.setenv("COMP_WORDS", "\n".join(["smolctl", *words]))
    patch.setenv("COMP_CWORD", str(len(words)))
    return smolctl().out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("quan", ["quantize"]),
        ("sample ", ["runs/nano-001", "runs/nano-002", "model.gguf"]),
        ("sample runs/nano-001@1", ["runs/nano-001@100", "runs/nano-001@150"]),
        ("compare runs/nano-001@b", ["runs/nano-001@best"]),
        ("train m", ["mine.yaml"]),
        ("train --data py", ["python"]),
        ("train --set train.st", ["train.steps=", "train.steps=5000"]),
        ("train --set schedule.name=co", ["schedule.name=cosine", "schedule.name=constant"]),
        ("train --set data.strict=", ["data.strict=", "data.strict=true", "data.strict=false"]),
        ("count-params nano --set num_h", ["num_hidden_layers=", "num_hidden_layers=30"]),
        ("bench --suite load,de", ["load,decode"]),
        ("bench --against lit", ["litgpt"]),
        ("quantize --to int8-", ["int8-dynamic"]),
        ("sample --engine na", ["native"]),
        ("push --license apa", ["apache-2.0"]),
        ("push --page ", []),  # the shell's own names of files
        ("train nowhere/", []),
    ],
)
def test_a_shell_is_offered_what_can_follow(
    line: str, offered: list[str], smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fish(smolctl, monkeypatch, line) == offered


def test_presets_and_keys_are_those_that_there_are(smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fish(smolctl, monkeypatch, "train ") == [*preset_names(), "mine.yaml"]
    assert set(fish(smolctl, monkeypatch, "train --set ")) == {f"{key}=" for key in RunConfig().settings()}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("sample", "runs/nano-001", "@"), ["best", "100", "150"]),
        (("sample", "runs/nano-001", "@", "15"), ["150"]),
        (("train", "--set", "schedule.name", "=", "w"), ["wsd"]),
        (("bench", "--suite", "=", "load,de"), ["load,decode"]),
        (("train", "--set", "=", "train.st"), ["train.steps=", "train.steps=5000"]),
        (("sample", "--engine", "na"), ["native"]),
    ],
)
def test_bash_is_given_the_part_of_a_word_that_it_replaces(
    words: tuple[str, ...], offered: list[str], smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bash(smolctl, monkeypatch, *words) == offered


def test_names_are_the_librarys() -> None:
    assert set(completion.SCHEMES) == set(SCHEMES)
    assert set(completion.GGUF_SCHEMES) == set(gguf.SCHEMES)
    assert completion.SUITES == SUITES
    assert tuple(PEERS) == completion.PEERS
    assert tuple(TRAINING_DTYPES) == completion.DTYPES
    loggers = TrainerConfig.model_json_schema()["properties"]["loggers"]["items"]["enum"]
    assert (*loggers, "none") == completion.LOGGERS


@pytest.mark.parametrize(
    ("command", "kinds", "renamed"),
    [
        ("bench", (BenchOptions,), {}),
        ("compare", (CompareOptions,), {"size": "bytes"}),
        ("eval", (EngineOptions,), {}),
        ("push", (PushOptions,), {}),
        ("quantize", (QuantizeOptions, SchemeOptions), {}),
        ("sample", (EngineOptions,), {}),
        ("serve", (ServeOptions, Limits, EngineOptions), {"timeout": "answer_s", "ping": "ping_s"}),
    ],
)
def test_options_have_the_defaults_of_the_library(
    command: str, kinds: Sequence[type[Any]], renamed: Mapping[str, str]
) -> None:
    """They are written twice: help shows them before the library is imported."""
    function = getattr(import_module(f"smolctl.cli.{command}"), command)
    library = {one.name: one.default for kind in kinds for one in fields(kind)}
    shown = {renamed.get(name, name): one.default for name, one in signature(function).parameters.items()}
    both = {name: value for name, value in shown.items() if name in library and value is not None}
    assert both
    for name, value in both.items():
        assert library[name] in (value, (value,)), name


@pytest.mark.slow
def test_completing_imports_no_pytorch() -> None:
    code = (
        "import sys, atexit; from smolctl.cli.main import main; sys.argv = ['smolctl']\n"
        "atexit.register(lambda: print({'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules)))\n"
        "main()"
    )
    for line in ("quantize --to ", "sample runs/nano-001@", "train --set train.", "bench --suite ", ""):
        asked = {ASK: "complete_zsh", "_TYPER_COMPLETE_ARGS": f"smolctl {line}"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
        )
        assert done.stdout.endswith("\nset()\n"), line
