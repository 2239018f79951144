"""MODEL arguments that people give by mistake: each is called what it is, with what to do."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from smolctl.config import load_run_config
from smolctl.errors import InputError
from smolctl.inspection import compare, count_source, training_config
from smolctl.sources import SourceKind, open_source
from smolctl.sources.address import hub_id_of
from tests.support.gguf_files import write_gguf
from tests.support.model_folders import llama_folder
from tests.support.tiny_models import tiny_network, write_folder

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.mark.skipif(sys.platform != "linux", reason="there is no file here that cannot be read")
def test_a_file_that_the_disk_does_not_give_is_named() -> None:
    with pytest.raises(InputError, match="/proc/self/mem: Input/output error"):
        open_source("/proc/self/mem")


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "pytorch_model.bin", "config.json"])
@pytest.mark.parametrize("in_folder", [True, False])
def test_a_git_lfs_pointer_is_called_one(name: str, in_folder: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(InputError, match="Git LFS pointer") as caught:
        open_source(str(tmp_path if in_folder else tmp_path / name))
    assert "git lfs pull" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weight_map": {"a": "b.safetensors"}}, "an index of weights"),
        ({"model": {"vocab": {}}, "added_tokens": []}, "a tokenizer"),
        (
            {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "org/base"},
            "LORA adapter of rank 4 for org/base",
        ),
        ({"name": "package"}, "no config.json"),
    ],
)
def test_another_json_of_a_model_is_called_what_it_is(content: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        open_source(str(tmp_path / "x.json"))


def test_a_tokenizer_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "model") / "tokenizer.json"
    files = open_source(str(path.parent)).read_tokenizer()
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert open_source(str(path.parent)).read_tokenizer() == files


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_with_a_byte_order_mark_is_read(encoding: str, tmp_path: Path) -> None:
    text = (llama_folder(tmp_path / "model") / "config.json").read_text()
    (tmp_path / "x.json").write_text(text, encoding=encoding)
    assert open_source(str(tmp_path / "x.json")).config is not None


def test_a_web_page_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(InputError, match="a web page"):
        open_source(str(tmp_path / "model.gguf"))


def test_a_broken_link_names_its_target(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"a link to .*gone"):
        open_source(str(tmp_path / "model"))


def test_bytes_behind_the_last_tensor_are_refused_as_safetensors_refuses_them(tmp_path: Path) -> None:
    path = llama_folder(tmp_path / "model") / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"12345678")
    with pytest.raises(InputError, match="8 bytes follow the last tensor"):
        open_source(str(path))


def test_a_folder_whose_only_model_is_one_file_is_that_file(tmp_path: Path) -> None:
    network = tiny_network(position_embedding="rope", residual_scale=1.0)
    write_gguf(tmp_path / "one.gguf", network.config, network.state_dict())
    (tmp_path / "training_args.bin").write_bytes(b"")
    assert open_source(str(tmp_path)).kind is SourceKind.GGUF
    shutil.copy(tmp_path / "one.gguf", tmp_path / "two.gguf")
    with pytest.raises(InputError, match=r"one\.gguf, two\.gguf"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [(struct.pack("<I", 9), "version 9"), (struct.pack(">I", 3), "big-endian")],
    ids=["a later version", "big-endian"],
)
def test_a_gguf_of_another_make_is_not_called_damaged(change: bytes, said: str, tmp_path: Path) -> None:
    network = tiny_network(position_embedding="rope", residual_scale=1.0)
    path = write_gguf(tmp_path / "one.gguf", network.config, network.state_dict())
    content = path.read_bytes()
    path.write_bytes(content[:4] + change + content[8:])
    with pytest.raises(InputError, match=said) as caught:
        open_source(str(path))
    assert "damaged" not in caught.value.message + caught.value.hint


def test_a_quantized_type_that_is_not_known_still_counts(tmp_path: Path) -> None:
    network = tiny_network(position_embedding="rope", residual_scale=1.0)
    path = write_gguf(tmp_path / "one.gguf", network.config, network.state_dict())
    content, name = path.read_bytes(), b"blk.1.ffn_down.weight"
    at = content.index(name) + len(name) + 4 + 16  # number of dimensions, two sizes
    path.write_bytes(content[:at] + struct.pack("<I", 99) + content[at + 4 :])
    source = open_source(str(path))
    assert count_source(source).totals.unique == sum(tensor.numel() for tensor in network.parameters())
    with pytest.raises(InputError, match="type 99 cannot be read"):
        list(source.require_weights().stored())


@pytest.mark.parametrize(
    ("pasted", "meant"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/", "org/name"),
        ("https://huggingface.co/org/name/tree/main", "org/name@main"),
        ("https://huggingface.co/org/name/blob/v1.0/config.json", "org/name@v1.0"),
        ("https://hf.co/org/name?library=transformers", "org/name"),
        ("hf://org/name", "org/name"),
        ("hf://org/name@abc", "org/name@abc"),
        ("huggingface.co/org/name", "org/name"),
        ("hf.co/org/name:Q4_K_M", "org/name:Q4_K_M"),
        ("https://huggingface.co/org/name/resolve/main/model.safetensors?download=true", "org/name@main"),
        ("org/name", "org/name"),
        ("./model.gguf", "./model.gguf"),
    ],
)
def test_a_pasted_address_names_its_repository(pasted: str, meant: str) -> None:
    assert hub_id_of(pasted) == meant


@pytest.mark.parametrize(
    ("model", "said", "hint"),
    [
        ("org/name:Q4_K_M", "Q4_K_M", "hf download org/name --include '*Q4_K_M*.gguf'"),
        ("org/name@v1:Q8_0", "Q8_0", "hf download org/name --revision v1 --include"),
        ("hf.co/org/name:Q8_0", "Q8_0", "hf download org/name --include"),
        (
            "https://hf.co/org/name/blob/main/x/a.gguf",
            "only a part of",
            "hf download org/name x/a.gguf --local-dir",
        ),
        ("https://hf.co/org/name/tree/v2/onnx", "only a part of", "hf download org/name onnx --revision v2"),
        ("https://huggingface.co/datasets/org/name", "not the address of a model", "Download"),
        ("https://example.com/model.gguf", "not the address of a model", "Download"),
        ("", "MODEL is empty", "Give a preset"),
    ],
)
def test_what_stands_for_one_file_of_a_repository_says_how_to_get_it(
    model: str, said: str, hint: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        open_source(model)
    assert hint in caught.value.hint


@pytest.mark.parametrize("text", ['{"model_type": "llama"}', "model: {num_hidden_layers: 2}\n"])
def test_a_config_is_read_from_standard_input(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert open_source("-").config is not None


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"tjgg", "a GGML file"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\x93NUMPY", "NumPy"),
        (b"\x1f\x8b\x08", "an archive"),
    ],
)
def test_a_file_of_another_format_is_called_what_it_is(start: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(start + bytes(64))
    with pytest.raises(InputError, match=f"{said}.*, which is not read"):
        open_source(str(tmp_path / "model.bin"))


def test_an_index_whose_files_are_all_elsewhere_does_not_hinder_the_count(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    expected = count_source(open_source(str(folder))).totals
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = open_source(str(folder))
    assert count_source(source).totals == expected
    with pytest.raises(InputError, match="a folder has no weights: none of the 2 files that"):
        source.require_weights()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin"])
def test_a_part_of_a_model_that_is_a_broken_link_is_not_taken_for_an_absent_one(
    name: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "gone")
    named = [folder] if name == "model.safetensors" else [folder, folder / "model.safetensors"]
    for model in named:
        with pytest.raises(InputError, match=f"{name}: a link to .*gone, which is not there"):
            open_source(str(model))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "extra.gguf"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_part_of_a_model_that_is_no_file_is_neither_waited_for_nor_taken_for_an_absent_one(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    if (name, make) == ("extra.gguf", os.mkdir):
        assert open_source(str(folder)).config is not None  # a folder of that name is no part of a model
        return
    with pytest.raises(InputError, match=f"{name}: not a file"):
        open_source(str(folder))


def test_a_part_of_split_pytorch_weights_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    for part in (1, 2):
        (folder / f"pytorch_model-{part:05d}-of-00002.bin").write_bytes(b"PK\x03\x04")
    for model in (folder, folder / "pytorch_model-00002-of-00002.bin"):
        with pytest.raises(InputError, match="one of 2 files"):
            open_source(str(model))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "LORA adapter of rank 4 for org/base",
        ),
        ("transformer.h.0.attn.c_attn.weight", "GPT-2"),
    ],
)
def test_weights_of_another_kind_beside_a_config_are_called_what_they_are(
    tensor: str, said: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "model")
    save_file({tensor: np.zeros((4, 32), np.float32)}, folder / "model.safetensors")
    if "lora" in tensor:
        adapter = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "org/base"}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    source = open_source(str(folder))
    assert said in source.unsupported
    assert count_source(source).totals.unique == 4 * 32


def test_sequences_longer_than_the_context_of_our_yaml_hinder_its_recipe_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {max_position_embeddings: 64, num_hidden_layers: 2}")  # data's default is 1,024
    source = open_source(str(path))
    assert count_source(source).totals.unique == 28_311_552 + 64 * 576 + 2 * 3_540_096 + 576
    assert source.run is None
    with pytest.raises(InputError, match="longer than the model's context of 64: no recipe for train"):
        training_config(source)
    path.write_text("model: {max_position_embeddings: 64}\ndata: {sequence_length: 128, sead: 1}")
    with pytest.raises(InputError, match=r"data\.sead"):
        open_source(str(path))


def test_train_says_how_to_translate_a_nanotron_recipe(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("model: {model_config: {hidden_size: 64}}\n")
    with pytest.raises(InputError, match="a nanotron recipe") as caught:
        load_run_config(str(tmp_path / "x.yaml"))
    assert "--yaml" in caught.value.hint


def test_a_written_config_names_its_tokenizer_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert training_config(open_source("model")).tokenizer == str(tmp_path / "model")


def test_a_model_that_cannot_be_run_is_compared_in_the_same_words(tmp_path: Path) -> None:
    one, other = llama_folder(tmp_path / "one"), llama_folder(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    assert compare(open_source(str(one)), open_source(str(other))).config == ()
    (other / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    keys = [item.key for item in compare(open_source(str(one)), open_source(str(other))).config]
    assert keys == ["model_type"]
