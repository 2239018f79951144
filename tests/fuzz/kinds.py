"""The kinds of input: of each a valid small one, what is changed in it, and the commands that read it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import yaml

from smolctl.benchmark.baseline import FORMAT as BENCH
from smolctl.benchmark.baseline import is_baseline, read_baseline
from smolctl.config import RunConfig
from smolctl.config.data import DataConfig
from smolctl.config.dump import to_yaml
from smolctl.data.text.corpus import iter_texts
from smolctl.data.tokens.cache import MANIFEST
from smolctl.data.tokens.corpus import tokenize_corpus
from smolctl.hub.identity import read_identity
from smolctl.publish.card import merge_card, stated_license
from smolctl.publish.facts import read_facts, write_records
from smolctl.runs.folder import RunFolder
from smolctl.sources.base import ModelSource, SourceKind
from tests.fuzz.harness import Case
from tests.fuzz.inputs import CHAT, Act, base, changed_json, command, copied
from tests.fuzz.model_files import (
    checkpoint_case,
    config_case,
    gguf_case,
    index_case,
    quantized_case,
    safetensors_case,
    template_case,
    tokenizer_case,
)
from tests.fuzz.mutation import HOSTILE, as_json, broken, mutated, spelled
from tests.support.loopback import Loopback
from tests.support.tiny_models import tiny_tokenizer


def manifest_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    os.environ["SMOLCTL_CACHE"] = str(folder / "cache")
    (folder / "a.txt").write_text("the cat sat on the mat. " * 50)
    data = DataConfig(source=(str(folder / "a.txt"),), sequence_length=16)

    def tokenize() -> None:
        tokenize_corpus(data, tiny_tokenizer())

    tokenize()
    for path in (folder / "cache").rglob(MANIFEST):
        changed_json(chance, path)
    return command("cache", "--json"), tokenize


def rows_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    rows: list[Any] = [{"text": "the cat", "id": 1}, {"text": "sat", "of": {"a": [1, 2]}}]
    ending = chance.choice(("jsonl", "json", "csv", "txt"))
    if ending == "json":
        content = as_json(mutated(chance, rows))
    elif ending == "jsonl":
        content = b"\n".join(as_json(mutated(chance, row)) for row in rows)
    else:
        content = b'text,id\n"the cat",1\n"a ""quoted""\nline",2\n'
    path = folder / f"a.{ending}"
    is_broken = ending in ("csv", "txt") or chance.random() < 0.4
    path.write_bytes(broken(chance, content) if is_broken else content)
    return (lambda: list(iter_texts(DataConfig(source=(str(path),)))),)


def records_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    run = copied("run", folder)
    records = ("metrics.jsonl", "predictions.jsonl", "environment.json", "tasks.json", ".smolctl.json")
    for name in chance.sample([*records, "quantized/verdict.json"], 2):
        path = run / name
        if path.suffix == ".json":
            changed_json(chance, path)
            continue
        lines = path.read_text().splitlines()
        for number in chance.sample(range(len(lines)), 2):
            lines[number] = as_json(mutated(chance, json.loads(lines[number]))).decode("utf-8", "replace")
        text = "\n".join(lines).encode() + b"\n"
        path.write_bytes(broken(chance, text) if chance.random() < 0.2 else text)
    run_folder = RunFolder(run)
    source = ModelSource(SourceKind.RUN, str(run), RunConfig().model, run=RunConfig(), step=5)
    draw = chance.random() < 0.05  # a picture takes half a second

    def published() -> None:
        facts = read_facts(source, run)
        assert facts.hardware
        if draw:
            (folder / "out").mkdir()
            write_records(facts, run, folder / "out")

    return (
        *(run_folder.write_predictions, published, lambda: run_folder.keep_records(3)),
        *(
            lambda: run_folder.update_environment({"device": "cuda"}),
            command("inspect-config", run, "--json"),
        ),
    )


def yaml_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    path = folder / "run.yaml"
    values: Any = yaml.safe_load(to_yaml(RunConfig()))
    if chance.random() < 0.3:
        values = {
            "model": {"model_config": {"hidden_size": 32, "num_attention_heads": 2, "is_llama_config": True}},
            "tokens": {"train_steps": 5, "micro_batch_size": 2, "sequence_length": 16},
            "optimizer": {"learning_rate_scheduler": {"lr_warmup_steps": 1}},
            "data_stages": [{"data": {"seed": 1, "dataset": {"dataset_folder": ["a"]}}}],
        }
    values = mutated(chance, values)
    text = spelled(yaml.dump(values, allow_unicode=True, default_flow_style=chance.random() < 0.5))
    if chance.random() < 0.6:
        lines = text.split("\n")
        at = chance.randrange(len(lines))
        lines[at] = lines[at].partition(":")[0] + ": " + chance.choice(YAML)
        text = "\n".join(lines)
    content = text.encode("utf-8", "surrogatepass")
    path.write_bytes(broken(chance, content) if chance.random() < 0.15 else content)
    return (
        command("inspect-config", path, "--json"),
        command("inspect-config", path, "--yaml"),
        command("count-params", path),
    )


YAML = (
    *(
        "2024-13-45",
        "2024-01-01",
        '!!int ""',
        "!!int x",
        "!!float x",
        "!!bool x",
        "!!timestamp x",
        "!!binary x",
    ),
    *(
        "!!python/object/apply:os.system [id]",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "*a",
        "&a [*a]",
        "&a {b: *a}",
        "!x y",
    ),
    *(
        "1:1:1:1:1",
        "0x",
        "0b",
        "0o8",
        "!!null x",
        "!!str",
        "~",
        "<<",
        "{<<: {a: 1}}",
        "{<<: 5}",
        "? [a]",
        "{[a]: 1}",
    ),
    *(
        "9" * 5_000,
        "[" * 5_000,
        "- " * 500,
        '"\\ud800"',
        '"\\x00"',
        "|",
        ">",
        "@x",
        "%x",
        "`",
        "\t",
        "1e999",
        ".nan",
    ),
    *(
        "-.inf",
        "!!float " + "1:" * 500 + "1",
        "{1: 2}",
        "{null: 1}",
        "{true: 1}",
        "!!map [a]",
        "!!seq {a: 1}",
    ),
    "[" + ", ".join(["&a [x]", *["*a"] * 5]) + "]",
)


def set_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    keys = [
        *RunConfig().settings(),
        "hidden_size",
        "model",
        "train",
        "",
        "a",
        "a." * 500,
        "data.source.0",
        ".",
    ]
    values = [str(chance.choice(HOSTILE)) if chance.random() < 0.5 else chance.choice(YAML) for _ in range(3)]
    items = [f"{chance.choice(keys)}={spelled(value)}" for value in values[: chance.randint(1, 3)]]
    options = [part for item in items for part in ("--set", item.replace("\0", "0"))]
    return command("inspect-config", "nano", "--json", *options), command("count-params", "nano", *options)


def card_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    metadata: Any = {
        "license": "mit",
        "tags": ["a"],
        "datasets": ["b"],
        "language": "en",
        "widget": [{"text": "x"}],
    }
    text = spelled(yaml.dump(mutated(chance, metadata)))
    if chance.random() < 0.5:
        text += f"model-index: {chance.choice(YAML)}\n"
    card = f"---\n{text}---\n# Title\nText\n"
    if chance.random() < 0.2:
        card = broken(chance, card.encode("utf-8", "replace")).decode("utf-8", "replace")

    def merge() -> None:
        merged = merge_card({"tags": ["smolctl"], "license": "mit"}, "generated", card)
        stated_license(merged)

    return (merge,)


def baseline_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    result = {
        "suite": "decode",
        "engine": "smolctl",
        "precision": "F32",
        "work": "1",
        "median": 1.0,
        "values": [1.0],
    }
    machine = {
        "cpu": "x",
        "logical_cpus": 2,
        "threads": 2,
        "versions": {"torch": "2"},
        "limits": {"bandwidth": 1e9},
    }
    model = {"id": "a", "parameters": 5, "shape": "b"}
    document = {
        "format": BENCH,
        "version": 1,
        "machine": machine,
        "model": model,
        "results": [result],
        "disturbed": "",
    }
    path = folder / "base.json"
    path.write_text(json.dumps(document))
    changed_json(chance, path)
    return lambda: read_baseline(path), lambda: is_baseline(path)


def prompts_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    rows: list[Any] = [
        {"prompt": "a", "max_tokens": 2, "temperature": 0.5, "top_k": 3, "seed": 1, "stop": ["x"]},
        {"messages": CHAT, "n": 2},
    ]
    lines = [as_json(mutated(chance, row)) for row in rows]
    path = folder / "prompts.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return (
        command(
            "sample", base() / "model", "--prompts", path, "--max-tokens", "2", "-o", folder / "out.jsonl"
        ),
    )


def hub_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    """The Hub's own answers: about a repository, and about a token."""
    info = {"sha": "0" * 40, "siblings": [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"}]}
    scope = {"entity": {"name": "me"}, "permissions": ["repo.write"]}
    token = {"displayName": "t", "role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    whoami = {"name": "me", "orgs": [{"name": "org"}], "auth": {"accessToken": token}}
    answer = as_json(mutated(chance, info))
    answer = broken(chance, answer) if chance.random() < 0.2 else answer
    model = base() / "model"
    identity: Any = mutated(chance, whoami)

    def opened() -> None:
        with _Answers(answer, model) as hub:
            os.environ["HF_ENDPOINT"] = hub.url
            os.environ["HF_HUB_CACHE"] = str(folder / "hub")
            command("inspect-config", "me/x", "--json")()

    return opened, lambda: read_identity(identity)


class _Answers(Loopback):
    """Gives one answer about every repository, and the files of a folder."""

    def __init__(self, answer: bytes, model: Path) -> None:
        self.answer, self.model = answer, model

    def __enter__(self) -> _Answers:
        answers = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                file = answers.model / Path(self.path).name
                is_answer = self.path.startswith("/api/")
                content = answers.answer if is_answer else file.read_bytes() if file.is_file() else b""
                self.send_response(200 if is_answer or file.is_file() else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self.serve(Handler)
        return self


KINDS: Mapping[str, Case] = {
    "config": config_case,
    "tokenizer": tokenizer_case,
    "template": template_case,
    "safetensors": safetensors_case,
    "index": index_case,
    "gguf": gguf_case,
    "checkpoint": checkpoint_case,
    "quantized": quantized_case,
    "manifest": manifest_case,
    "rows": rows_case,
    "records": records_case,
    "yaml": yaml_case,
    "set": set_case,
    "card": card_case,
    "baseline": baseline_case,
    "prompts": prompts_case,
    "hub": hub_case,
}
