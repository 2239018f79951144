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
from smolctl.quantization.build import read_tensors
from smolctl.quantization.quantize import QuantizeOptions, quantize
from smolctl.sources import open_source
from smolctl.sources.base import ModelSource
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
        (["layers.0.attention.wq.weight", "layers.0.block_sparse_moe.w1"], "Meta's format"),
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


def neighbours(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rows of Q and K as transformers' `convert_llama_weights_to_hf` finds them at Meta's."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    rows, width = tensor.shape
    return tensor.view(rows // 8, 2, 4, width).transpose(1, 2).reshape(rows, width)


META = {
    **{"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"},
    **{"model.layers": "layers", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk"},
    **{"self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo"},
    **{"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2"},
    **{"mlp.up_proj": "feed_forward.w3", "post_attention_layernorm": "ffn_norm"},
    "input_layernorm": "attention_norm",
}
TORCHTUNE = {
    **META,
    **{"self_attn.o_proj": "attn.output_proj", "self_attn": "attn", "mlp.gate_proj": "mlp.w1"},
    **{
        "mlp.down_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w3",
        "post_attention_layernorm.weight": "mlp_norm.scale",
    },
    **{"input_layernorm.weight": "sa_norm.scale", "model.norm.weight": "norm.scale"},
}


def in_layout(names: dict[str, str]) -> State:
    state = {}
    for name, tensor in STATE.items():
        new = name
        for ours, theirs in sorted(names.items(), key=lambda pair: -len(pair[0])):
            new = new.replace(ours, theirs)
        state[new] = neighbours(name, tensor)
    return state


@pytest.mark.parametrize("layout", ["Meta", "Mistral", "torchtune"])
def test_a_llama_in_metas_layout_is_read_with_its_rows_in_our_order(layout: str, tmp_path: Path) -> None:
    config = NETWORK.config
    state = in_layout(TORCHTUNE if layout == "torchtune" else META)
    assert len(set(state) & set(STATE)) == 0
    params = {"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "rope_theta": 500.0}
    params |= {"n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads}
    params |= {"hidden_dim": config.intermediate_size, "norm_eps": 1e-5, "vocab_size": -1, "head_dim": 8}
    if layout == "Mistral":
        save_file(
            {name: tensor.clone() for name, tensor in state.items()}, tmp_path / "consolidated.safetensors"
        )
    else:
        torch.save({**state, "rope.freqs": torch.ones(4)}, tmp_path / "consolidated.00.pth")
    if layout == "torchtune":
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    else:
        (tmp_path / "params.json").write_text(json.dumps(params))
    source = open_source(str(tmp_path))
    loaded = load_network(source).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in STATE.items())
    assert source.require_config().rope_theta == 500.0
    assert bool(source.assumptions) == (layout != "torchtune")  # no params.json says how long the context is
    assert count_source(source).totals == count_source(open_source(str(write_reference(tmp_path)))).totals


def test_a_share_of_metas_tensors_is_no_model(tmp_path: Path) -> None:
    for number in range(2):
        torch.save(in_layout(META), tmp_path / f"consolidated.0{number}.pth")
    for model in (tmp_path, tmp_path / "consolidated.01.pth"):
        with pytest.raises(
            InputError, match="one of 2 files of a Meta checkpoint, each of which holds a part"
        ):
            open_source(str(model))


@pytest.mark.parametrize(
    "read", [load_network, lambda source: load_network(source, torch.float32), read_tensors]
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_integers_without_scales_are_no_weights(
    dtype: torch.dtype, read: Callable[[ModelSource], object], tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    state = {**STATE, name: STATE[name].to(dtype)}
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for model in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(InputError, match=f"{name} contains integers"):
            read(open_source(str(model)))


def test_weights_that_are_packed_in_an_unknown_way_are_counted_by_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**CONFIG, "quantization_config": {"quant_method": "hqq"}})
    )
    expected = count_source(open_source(str(tmp_path / "config.json"))).totals
    state = {name: tensor.clone() for name, tensor in STATE.items() if "q_proj" not in name}
    packed = {"model.layers.0.self_attn.q_proj.W_q": torch.zeros(4, 4, dtype=torch.uint8)}
    save_file({**state, **packed}, tmp_path / "model.safetensors")
    report = count_source(open_source(str(tmp_path)))
    assert (report.totals, report.agrees) == (expected, None)
    assert "in an unknown layout" in report.notes[0]


def write_reference(folder: Path) -> Path:
    (folder / "reference").mkdir()
    save_file(
        {name: tensor.clone() for name, tensor in STATE.items()}, folder / "reference/model.safetensors"
    )
    (folder / "reference/config.json").write_text(json.dumps(CONFIG))
    return folder / "reference"


# Those of meta-llama/Llama-2-7b, Llama-3.2-1B and mistralai's Mixtral-8x7B.
LLAMA_2 = {
    "dim": 4096,
    "multiple_of": 256,
    "n_heads": 32,
    "n_layers": 32,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}
LLAMA_32 = {
    **{"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_heads": 32, "n_kv_heads": 8},
    **{"n_layers": 16, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True},
    "vocab_size": 128256,
}
MIXTRAL = {
    **{"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8},
    **{"norm_eps": 1e-05, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8}},
}


def test_a_config_json_with_some_of_metas_words_is_none_of_metas(tmp_path: Path) -> None:
    values = {"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    (tmp_path / "x.json").write_text(json.dumps(values))
    assert open_source(str(tmp_path / "x.json")).declared == values


def test_a_params_json_alone_is_described(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    path.write_text(json.dumps({**LLAMA_2, "vocab_size": 32_000}))
    assert count_source(open_source(str(path))).totals.unique == 6_738_415_616
    path.write_text(json.dumps(LLAMA_32))
    source = open_source(str(path))
    config = source.require_config()
    assert (config.intermediate_size, config.head_dim) == (8_192, 64)
    assert config.rope_scaling is not None
    assert count_source(source).totals.non_embedding == 973_146_112
    path.write_text(json.dumps(MIXTRAL))
    source = open_source(str(path))
    assert "params.json with moe is not supported" in source.unsupported
    assert count_source(source).totals.unique is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, 0) for key in ("n_kv_heads", "head_dim", "hidden_dim", "multiple_of", "max_seq_len")),
        *((key, 0) for key in ("ffn_dim_multiplier", "rope_scaling_factor", "high_freq_factor", "norm_eps")),
        *(("n_heads", value) for value in (0, "32", True, None)),
        *(("tied_embeddings", value) for value in ("false", 0)),
        ("ffn_dim_multiplier", 1e300),
    ],
)
def test_a_wrong_value_of_a_params_json_is_not_taken_for_one_that_is_left_out(
    key: str, value: object, tmp_path: Path
) -> None:
    (tmp_path / "params.json").write_text(json.dumps({**LLAMA_32, key: value}))
    with pytest.raises(InputError, match=rf"params\.json: {key}: "):
        open_source(str(tmp_path / "params.json"))


def test_null_in_a_params_json_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps({**LLAMA_32, "n_kv_heads": None, "multiple_of": None}))
    assert open_source(str(tmp_path / "params.json")).require_config().num_key_value_heads == 32


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
    with pytest.raises(InputError, match=r"incomplete: .*head_dim") as caught:
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
