"""Damaged model files: configs, tokenizers, templates, weights, checkpoints."""

from __future__ import annotations

import functools
import json
import random
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from smolctl.config import RunConfig
from smolctl.config.data import DataConfig
from smolctl.data.tokenizer.chat import fill
from smolctl.data.tokenizer.text_encoder import TextEncoder
from smolctl.data.tokenizer.tokenizer import load_tokenizer
from smolctl.errors import InputError
from tests.fuzz.inputs import CHAT, Act, base, changed_json, command, copied, random_weights, sampled
from tests.fuzz.mutation import as_json, broken, mutated
from tests.support.tiny_models import TEMPLATE, tiny_tokenizer
from tests.support.tokenizers import MAKERS, tokenizer


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
    model, state = random_weights()
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
