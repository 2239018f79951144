"""Weights of other tools: read where the names map, and named with what to do where they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from smolctl.errors import InputError
from smolctl.inspection import count_source
from smolctl.model.weights import load_network
from smolctl.quantization.quantize import QuantizeOptions, quantize
from smolctl.sources import open_source
from smolctl.sources.huggingface.config import to_huggingface_config
from smolctl.sources.names import huggingface_names
from smolctl.sources.provenance import provenance_of
from tests.support.gguf_files import write_gguf
from tests.support.tiny_models import tiny_network, tiny_tokenizer, write_folder

NETWORK = tiny_network(
    position_embedding="rope", residual_scale=1.0, head_dim=8, rope_theta=500.0, tie_word_embeddings=True
)
STATE = {name: tensor.detach() for name, tensor in NETWORK.state_dict().items()}
CONFIG = to_huggingface_config(NETWORK.config)
State = dict[str, torch.Tensor]


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


WRITERS: dict[str, Callable[[State], Any]] = {
    "torch.compile": prefixed("_orig_mod."),
    "Lightning, model": lambda state: {"state_dict": prefixed("model.")(state)},
    "Lightning, net": lambda state: {"state_dict": prefixed("net.")(state), "epoch": 3},
    "a trainer's model": lambda state: {"model": prefixed("_orig_mod.")(state), "iter_num": 5},
    "DeepSpeed": lambda state: {"module": state, "global_steps": 5, "ds_version": "0.15"},
    "DistributedDataParallel": prefixed("module."),
    "a part of a larger model": prefixed("language_model."),
    "LlamaModel": lambda state: {name.removeprefix("model."): tensor for name, tensor in state.items()},
    "one table of frequencies": lambda state: {**state, "model.rotary_emb.inv_freq": torch.ones(4)},
    "the head of a tied model": lambda state: {
        "lm_head.weight" if "embed" in name else name: tensor for name, tensor in state.items()
    },
    "both names of a tied table": lambda state: {
        **state,
        "lm_head.weight": state["model.embed_tokens.weight"],
    },
}


def assert_equal(path: Path) -> None:
    source = open_source(str(path))
    assert source.config == NETWORK.config
    assert not source.assumptions
    loaded = load_network(source).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize("writer", WRITERS)
def test_a_llama_under_the_names_of_another_tool_is_read(writer: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    written = WRITERS[writer](STATE)
    torch.save(written, tmp_path / "pytorch_model.bin")
    assert_equal(tmp_path / "pytorch_model.bin")
    flat = all(isinstance(value, torch.Tensor) for value in written.values())
    if flat:
        save_file({name: value.clone() for name, value in written.items()}, tmp_path / "model.safetensors")
        assert_equal(tmp_path)


def test_names_that_would_collide_stay_as_they_are() -> None:
    names = ["a.layers.0.input_layernorm.weight", "b.layers.0.input_layernorm.weight", "norm.weight"]
    assert huggingface_names(names, tied=False) == dict(zip(names, names, strict=True))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], "a LoRA adapter"),
        (["transformer.h.0.attn.qkv.weight", "lm_head.weight"], "a litgpt checkpoint"),
        (["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"], "GPT-2's kind"),
        (["layers.0.attention.wq.weight", "tok_embeddings.weight"], "Meta's format"),
        (["layers.0.attn.output_proj.weight", "tok_embeddings.weight"], "a torchtune checkpoint"),
    ],
)
def test_what_is_no_llama_in_our_names_is_recognized(names: list[str], said: str, tmp_path: Path) -> None:
    torch.save({"model": {name: torch.ones(4, 4) for name in names}}, tmp_path / "x.pth")
    source = open_source(str(tmp_path / "x.pth"))
    assert said in source.unsupported
    assert count_source(source).totals.unique == 16 * len(names)
    with pytest.raises(InputError, match=said.split()[-1]):
        source.require_config()


@pytest.mark.parametrize("beside", [True, False])
def test_a_lone_file_takes_the_config_beside_it_or_says_what_it_assumes(beside: bool, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    if beside:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        assert_equal(tmp_path / "pytorch_model.bin")
        return
    source = open_source(str(tmp_path / "pytorch_model.bin"))
    assert any("head_dim" in one for one in source.assumptions)
    assert set(source.assumptions) <= set(source.problems)
    assert provenance_of(source).assumed == source.assumptions
    source.require_certainty(accept_guesses=True)
    with pytest.raises(InputError, match=r"assumed: .*head_dim") as caught:
        quantize(source.id, QuantizeOptions())
    assert "--accept-guesses" in caught.value.hint


def test_the_tokenizer_beside_a_gguf_is_used_where_it_has_none(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", NETWORK.config, STATE)
    assert open_source(str(path)).read_tokenizer() is None
    (tmp_path / "tokenizer.json").write_text(tiny_tokenizer().backend.to_str())
    assert open_source(str(path)).require_tokenizer().tokenizer_json


def test_of_a_single_file_and_an_index_the_file_is_read_and_that_is_said(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    other = {name: torch.from_numpy(np.zeros(1, np.float32)) for name in ("a", "b")}
    save_file(other, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = open_source(str(folder))
    assert "model.embed_tokens.weight" in {tensor.name for tensor in source.tensors or ()}
    assert any("both there" in problem for problem in source.problems)
