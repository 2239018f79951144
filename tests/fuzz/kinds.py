"""The kinds of input: of each a valid small one, what is changed in it, and the commands that read it."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from typer.main import get_command

from smolctl.arithmetic import parameter_rows
from smolctl.benchmark.baseline import FORMAT as BENCH
from smolctl.benchmark.baseline import is_baseline, read_baseline
from smolctl.cli.main import application
from smolctl.config import ModelConfig, RunConfig
from smolctl.config.data import DataConfig
from smolctl.config.dump import to_yaml
from smolctl.data.text.corpus import iter_texts
from smolctl.data.tokenizer.chat import fill
from smolctl.data.tokenizer.text_encoder import TextEncoder
from smolctl.data.tokenizer.tokenizer import load_tokenizer
from smolctl.data.tokens.cache import MANIFEST
from smolctl.data.tokens.corpus import tokenize_corpus
from smolctl.errors import InputError
from smolctl.evaluation.task_record import record_tasks
from smolctl.hub.client import read_identity
from smolctl.publish.card import merge_card, stated_license
from smolctl.publish.facts import read_facts, write_records
from smolctl.runs.environment import write_environment
from smolctl.runs.events import Candidate, Prediction, Step, Validation
from smolctl.runs.folder import RunFolder
from smolctl.runs.layout import ENVIRONMENT
from smolctl.sources.base import ModelSource, SourceKind
from smolctl.sources.huggingface.config import to_huggingface_config
from tests.fuzz.harness import Case
from tests.fuzz.mutation import HOSTILE, as_json, broken, mutated, spelled
from tests.support.gguf_files import write_gguf
from tests.support.loopback import Loopback
from tests.support.tiny_models import TEMPLATE, tiny_tokenizer
from tests.support.tokenizers import MAKERS, tokenizer

Act = Callable[[], object]
CHAT = [{"role": "user", "content": "hi"}]


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
def _weights() -> tuple[ModelConfig, dict[str, torch.Tensor]]:
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
    config, state = _weights()
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


def config_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    model = copied("model", folder)
    changed_json(chance, model / "config.json")
    return (*sampled(model), command("count-params", model))


def tokenizer_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    model = copied("model", folder)
    if chance.random() < 0.5:
        (model / "tokenizer.json").write_text(_tokenizer(chance.choice(list(MAKERS))))
    names = ("tokenizer.json",) * 4 + ("tokenizer_config.json", "generation_config.json")
    changed_json(chance, model / chance.choice(names))

    def encoded() -> None:
        loaded = load_tokenizer(str(model))
        loaded.decode(loaded.encode("the cat\n")[:5])
        loaded.token_byte_lengths()
        stream = loaded.stream()
        for token_id in (*loaded.prompt("ß <|im_end|>").ids, 0, 2, 5):
            stream.feed(token_id)
        encoder = TextEncoder(loaded)
        encoder.encode(list(encoder.pieces(["the cat sat. " * 20], 40)))

    return (*sampled(model), encoded, encoded, *(sampled(model, "--chat") if chance.random() < 0.1 else ()))


@functools.cache
def _tokenizer(kind: str) -> str:
    return str(tokenizer(kind).to_str())


def template_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    pieces = (
        *("{{ x }}", "{% for i in messages %}{% endfor %}", "{{ messages[0].content * 9 }}", "{{ 1/0 }}"),
        *(
            "{{ messages|tojson(indent=2) }}",
            "{{ 'a'.format(1) }}",
            "{% set x = namespace() %}",
            "{{ [] | first }}",
        ),
        *(
            "{{ messages|map(attribute='role')|list }}",
            "{{ 5|xmlattr }}",
            "{{ ''|center(-5) }}",
            "{% break %}",
        ),
        *(
            "{{ messages.__class__.__mro__ }}",
            "{{ cycler().next() }}",
            "{{ 'a'|truncate(-1) }}",
            "{{ raise_exception(1) }}",
        ),
        *(
            "{{ messages|sort }}",
            "{{ x.y.z }}",
            "{{ {}['a'] }}",
            "{{ range(9)|batch(0)|list }}",
            "{{ 9**9 }}",
        ),
        *(
            "{{ strftime_now('%Q\\ud800') }}",
            "{{ '%s %s' % 1 }}",
            "{{ 'x'|int(base=99) }}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        ),
        *(
            "{{ lipsum(n=2) }}",
            "{% include 'a' %}",
            "{% import 'a' as b %}",
            "{% extends 'a' %}",
            "{{ ('a',)|groupby('x') }}",
        ),
        *(
            "{{ '\\ud800' }}",
            "{{ 1|round(-9, 'x') }}",
            "{{ messages|dictsort }}",
            "{{ 'a'|indent('x') }}",
            "{{ dict(1) }}",
        ),
    )
    text = TEMPLATE
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.7:
            at = chance.randrange(len(text) + 1)
            text = text[:at] + chance.choice(pieces) + text[at + chance.choice((0, 0, 3)) :]
        else:
            text = broken(chance, text.encode()).decode("utf-8", "replace")

    def filled() -> None:
        """What `render_chat` has done in a process of its own; this one is limited too."""
        fault = fill(text, CHAT, {"bos_token": "<s>"}, True, 10_000)[1]
        if fault:
            raise InputError(fault, "Leave out --chat.")

    return (filled,)


def safetensors_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    model = copied("model", folder)
    path = model / "model.safetensors"
    data = path.read_bytes()
    if chance.random() < 0.4:
        path.write_bytes(broken(chance, data))
    else:
        length = struct.unpack("<Q", data[:8])[0]
        header = as_json(mutated(chance, json.loads(data[8 : 8 + length])))
        claimed = chance.choice((len(header),) * 8 + (2**62, 0, 10**8, length))
        path.write_bytes(struct.pack("<Q", claimed) + header + data[8 + length :])
    if chance.random() < 0.5:
        (model / "config.json").unlink()
    more = command("quantize", model, "--to", "int8", "--no-measure", "--out", folder / "q", "-q")
    return (*sampled(model), command("count-params", path), more)


def index_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    model = copied("sharded", folder)
    changed_json(chance, model / "model.safetensors.index.json")
    return sampled(model)


def gguf_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    path = folder / "model.gguf"
    data = (base() / "model.gguf").read_bytes()
    if chance.random() < 0.4:
        path.write_bytes(broken(chance, data))
    else:
        pairs, tensors = _gguf_parts()
        for _ in range(chance.randint(1, 3)):
            if chance.random() < 0.75:
                key = chance.choice(list(pairs))
                kinds: list[Any] = [
                    (4, 0),
                    (4, 2**32 - 1),
                    (5, -1),
                    (6, float("nan")),
                    (6, 1e38),
                    (7, True),
                    (8, "x"),
                    (8, ""),
                ]
                kinds += [
                    (10, 2**63),
                    (11, -(2**62)),
                    (12, 1e308),
                    (9, (4, [1, 2, 3])),
                    (9, (8, ["a", "b"])),
                    None,
                ]
                chosen = chance.choice(kinds)
                if chosen is None:
                    del pairs[key]
                else:
                    pairs[key] = chosen
            else:
                at = chance.randrange(len(tensors))
                name, shape, kind, offset = tensors[at]
                tensors[at] = chance.choice(
                    [
                        *(
                            (name, shape, kind, offset + 32),
                            (name, [*shape, 2**40], kind, offset),
                            ("x", shape, kind, 0),
                        ),
                        *((name, shape, chance.randrange(40), offset), (name, shape[::-1], kind, offset)),
                        (name, [2**62, 2**62], kind, offset),
                    ]
                )
        path.write_bytes(_gguf(pairs, tensors, data))
    return sampled(path)


@functools.cache
def _gguf_read() -> tuple[dict[str, Any], list[Any], int]:
    from gguf import GGUFReader

    reader = GGUFReader(base() / "model.gguf")
    pairs: dict[str, Any] = {}
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        types = [int(kind) for kind in field.types]
        pairs[key] = (types[0], (types[1], field.contents()) if types[0] == 9 else field.contents())
    start = min(int(tensor.data_offset) for tensor in reader.tensors)
    tensors = [
        (one.name, [int(n) for n in one.shape], int(one.tensor_type), int(one.data_offset) - start)
        for one in reader.tensors
    ]
    return pairs, tensors, start


def _gguf_parts() -> tuple[dict[str, Any], list[Any]]:
    pairs, tensors, _ = _gguf_read()
    return dict(pairs), list(tensors)


def _gguf(pairs: Mapping[str, Any], tensors: list[Any], data: bytes) -> bytes:
    """A file of these keys and tensors, with the data of the valid one."""
    codes = {4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(kind: int, item: Any) -> bytes:
        if kind == 9:
            return struct.pack("<IQ", item[0], len(item[1])) + b"".join(
                value(item[0], one) for one in item[1]
            )
        return text(item) if kind == 8 else struct.pack(f"<{codes[kind]}", item)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    head += b"".join(
        text(key) + struct.pack("<I", kind) + value(kind, item) for key, (kind, item) in pairs.items()
    )
    for name, shape, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32) + data[_gguf_read()[2] :]


@functools.cache
def _checkpoint() -> dict[str, Any]:
    """What a run's checkpoint holds, without the optimizer's part."""
    model, state = _weights()
    config = RunConfig(model=model, data=DataConfig(sequence_length=16))
    return {
        "state_dict": {f"network.{name}": tensor for name, tensor in state.items()},
        "hyper_parameters": {"config": config.model_dump(mode="json")},
        "tokenizer": asdict(tiny_tokenizer().files()),
        "global_step": 5,
        "smolctl": {
            "format": 2,
            "held_out": {"tokens": torch.tensor([[1, 2]]), "loss": 1.0, "document_end": 0},
        },
    }


def checkpoint_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    content: Any = dict(_checkpoint())
    weights = dict(content.pop("state_dict"))
    if chance.random() < 0.8:
        content = mutated(chance, content)
    if isinstance(content, dict):
        content["state_dict"] = weights
        if chance.random() < 0.5:
            name = chance.choice(list(weights))
            strange: tuple[Any, ...] = (torch.empty(3), torch.empty(2**40, device="meta"), 5, None, {})
            strange += (torch.zeros(1).expand(2**40), torch.zeros(2, 2).to_sparse())
            strange += (torch.zeros(320, 32, dtype=torch.complex64), torch.zeros(320, 32, dtype=torch.int64))
            weights[name] = chance.choice(strange)
    path = folder / "model.ckpt"
    torch.save(content, path)
    if chance.random() < 0.3:
        path.write_bytes(broken(chance, path.read_bytes()))
    return sampled(path)


def quantized_case(chance: random.Random, folder: Path) -> Iterable[Act]:
    model = copied("int8", folder)
    name = chance.choice(("quantization.json",) * 4 + ("config.json", "model.safetensors", ".smolctl.json"))
    if name == "model.safetensors":
        (model / name).write_bytes(broken(chance, (model / name).read_bytes()))
    else:
        changed_json(chance, model / name)
    again = command(
        "quantize", base() / "model", "--to", "int8", "--no-measure", "--out", model, "--force", "-q"
    )
    return (*sampled(model), again)


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
        *(run_folder.write_story, published, lambda: run_folder.keep_records(3)),
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
