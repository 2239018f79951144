"""Hugging Face folders, config.json in both spellings, and safetensors with and without a config."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from smolctl.config import ModelConfig
from smolctl.errors import InputError, SmolError
from smolctl.model.weights import initialize, load_network
from smolctl.sources import SourceKind, open_source
from smolctl.sources.huggingface.config import (
    NOT_WRITTEN,
    from_huggingface_config,
    to_huggingface_config,
)
from smolctl.sources.huggingface.safetensors_file import parse_header

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
OURS = ModelConfig(**SIZES, position_embedding="rope", residual_scale=1.0)


def llama_folder(folder: Path, max_shard_size: str = "50GB", dtype: str = "float32", **fields: Any) -> Any:
    """A tiny random model as transformers saves it; the model itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **fields})).to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"tie_word_embeddings": False}, id="untied"),
        pytest.param({"head_dim": 32}, id="head_dim"),
        pytest.param({"num_key_value_heads": 4}, id="no GQA"),
        pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}}, id="theta"),
        pytest.param({"max_shard_size": "20KB"}, id="sharded"),
        pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
    ],
)
def test_folder_of_transformers_gives_the_same_logits(tmp_path: Path, fields: dict[str, Any]) -> None:
    theirs = llama_folder(tmp_path, **fields)
    source = open_source(str(tmp_path))
    assert source.kind is SourceKind.FOLDER
    assert source.problems == ()
    assert sum(tensor.parameters for tensor in source.tensors or ()) == theirs.num_parameters()
    network = load_network(source, dtype=torch.float32)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(network(tokens), theirs.float()(tokens).logits, rtol=1e-4, atol=1e-5)


def test_bfloat16_files_stay_bfloat16_until_asked(tmp_path: Path) -> None:
    llama_folder(tmp_path, dtype="bfloat16")
    source = open_source(str(tmp_path))
    assert {tensor.dtype for tensor in source.tensors or ()} == {"BF16"}
    assert {tensor.dtype for _, tensor in source.require_weights().tensors()} == {torch.bfloat16}


def test_both_spellings_of_a_config_mean_the_same() -> None:
    v4 = {**LLAMA, "rope_theta": 123.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    v5 = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}, "dtype": "bfloat16"}
    first, second = (from_huggingface_config(values, "config.json") for values in (v4, v5))
    assert first == second
    assert first[0] is not None
    assert first[0].rope_theta == 123.0


def test_left_out_keys_take_llamas_defaults() -> None:
    from transformers import LlamaConfig

    theirs = LlamaConfig(**{key: value for key, value in SIZES.items() if key != "num_key_value_heads"})
    given = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    ours, _ = from_huggingface_config(given, "config.json")
    assert ours is not None
    for key in type(ours).model_fields:
        if key not in NOT_WRITTEN | {"rope_theta", "rope_scaling"}:
            assert getattr(ours, key) == getattr(theirs, key), key


def test_assumed_sizes_are_reported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    problems = open_source(str(tmp_path)).problems
    assert "hidden_size is not given: 4,096 is assumed, as by transformers" in problems


@pytest.mark.parametrize(
    ("fields", "feature"),
    [
        ({"model_type": "gpt2"}, "model_type gpt2"),
        ({"model_type": None}, "without model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling linear"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling llama3"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling longrope"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "llama3"}},
            "rope_scaling and rope_parameters contradict",
        ),
        (
            {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "default"}},
            "rope_scaling and rope_parameters contradict",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "for full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported (gptq)"),
        ({"sliding_window": 16}, "sliding_window is not supported (16)"),
        ({"rope_interleaved": True}, "rope_interleaved"),
    ],
)
def test_features_that_the_network_lacks_are_refused_by_name(fields: dict[str, Any], feature: str) -> None:
    config, unsupported = from_huggingface_config({**LLAMA, **fields}, "config.json")
    assert config is None
    assert feature in unsupported


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_attention_heads": 5}, "is not divisible"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"rope_parameters": 7}, "rope_parameters"),
        ({"hidden_size": True}, "hidden_size"),  # in Python True is 1
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),  # only null means as many as heads
        ({"num_key_value_heads": {}}, "num_key_value_heads"),
        ({"head_dim": []}, "head_dim"),
        ({"attention_dropout": ""}, "attention_dropout"),
    ],
)
def test_senseless_values_are_named(fields: dict[str, Any], cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        from_huggingface_config({**LLAMA, **fields}, "config.json")


def test_written_config_is_read_by_transformers_and_by_us(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    written = to_huggingface_config(OURS, dtype="float32")
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == OURS.rope_theta
    assert from_huggingface_config(written, "config.json") == (OURS, "")
    network = initialize(OURS, seed=7).eval()
    (tmp_path / "config.json").write_text(json.dumps(written))
    save_file(network.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(network(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_learned_positions_are_a_type_of_our_own_and_read_back() -> None:
    written = to_huggingface_config(ModelConfig())
    assert written["model_type"] == "smolctl"
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert from_huggingface_config(json.loads(json.dumps(written)), "config.json") == (ModelConfig(), "")
    earlier = {"model_type": "smolctl", **ModelConfig().model_dump(mode="json")}  # as `quantize` wrote it
    assert from_huggingface_config(earlier, "config.json") == (ModelConfig(), "")


def test_config_json_alone_is_a_model_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    source = open_source(str(path))
    assert source.config is not None
    assert source.tensors is None
    with pytest.raises(InputError, match="no weights"):
        source.require_weights()


def test_config_json_finds_the_weights_beside_it(tmp_path: Path) -> None:
    llama_folder(tmp_path)
    assert load_network(open_source(str(tmp_path / "config.json"))).config.hidden_size == 64


def test_tokenizer_of_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": [7, 8]}))
    vocab = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 5, "content": "<s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocab))
    settings = {
        "bos_token": {"content": "<s>"},
        "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "old"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    files = open_source(str(tmp_path)).read_tokenizer()
    assert files is not None
    assert (files.bos_token_id, files.eos_token_id, files.pad_token_id) == (5, 7, None)
    assert files.chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    again = open_source(str(tmp_path)).read_tokenizer()
    assert again is not None
    assert again.chat_template == "new"


def test_old_tokenizer_files_are_converted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    files = open_source(str(tmp_path)).read_tokenizer()
    assert files is not None
    assert json.loads(files.tokenizer_json)["model"]["vocab"]["ab"] == 2


@pytest.fixture
def lone(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"  # the kind is decided by content
    save_file(initialize(OURS, seed=2).state_dict(), path)
    return path


def test_config_beside_a_safetensors_file_is_used(lone: Path) -> None:
    (lone.parent / "config.json").write_text(json.dumps({**LLAMA, "rope_theta": 55.0}))
    source = open_source(str(lone))
    assert source.kind is SourceKind.SAFETENSORS
    assert not source.recovered_from_shapes
    assert source.config is not None
    assert source.config.rope_theta == 55.0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_config_is_recovered_from_shapes(tmp_path: Path, tied: bool, learned: bool) -> None:
    fields = {**SIZES, "hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}
    positions = {} if learned else {"position_embedding": "rope", "residual_scale": 1.0}
    config = ModelConfig(**fields, **positions, tie_word_embeddings=tied)
    save_file(initialize(config, seed=2).state_dict(), tmp_path / "x.safetensors")
    source = open_source(str(tmp_path / "x.safetensors"))
    assert source.recovered_from_shapes
    assert source.config is not None
    assumed = ("max_position_embeddings", "rope_theta")
    assert source.config.model_dump(exclude=set(assumed)) == config.model_dump(exclude=set(assumed))
    assert any("head_dim 64 is assumed" in problem for problem in source.problems)
    load_network(source)


def test_other_architectures_without_config_are_named(tmp_path: Path) -> None:
    save_file({"wte.weight": torch.zeros(4, 4)}, tmp_path / "gpt2.safetensors")
    source = open_source(str(tmp_path / "gpt2.safetensors"))
    assert source.config is None
    assert "no model.embed_tokens.weight" in source.unsupported
    assert len(source.tensors or ()) == 1


def test_tensors_that_do_not_fit_the_config_are_named(tmp_path: Path) -> None:
    state = dict(initialize(OURS, seed=2).state_dict())
    del state["model.norm.weight"]
    state["model.extra.weight"] = torch.zeros(1)
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 64)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    assert open_source(str(tmp_path)).problems == (
        "missing model.norm.weight",
        "unexpected model.extra.weight",
        "model.layers.0.mlp.up_proj.weight is [8, 64], the config says [96, 64]",
    )


def test_stored_head_and_rotary_tables_of_a_tied_model_are_accepted(tmp_path: Path) -> None:
    state = dict(initialize(OURS, seed=2).state_dict())
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    source = open_source(str(tmp_path))
    assert source.problems == ()
    load_network(source)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    llama_folder(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        open_source(str(tmp_path))


def test_a_tensor_in_two_shards_is_refused_because_readers_differ_in_which_they_take(tmp_path: Path) -> None:
    llama_folder(tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    state, name = load_file(second), next(iter(load_file(first)))
    save_file({**state, name: load_file(first)[name] * 2}, second, {"format": "pt"})
    with pytest.raises(InputError, match=f"{second.name}: holds {name}, although .* {first.name}"):
        open_source(str(tmp_path))


def test_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="outside its folder"):
        open_source(str(tmp_path))


def header_file(path: Path, header: Any, data: bytes = b"\0" * 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("header", "cause"),
    [
        (b"{not json", r"header cannot be read: not JSON \(Exp"),
        ({"a": 3}, "entry of 'a' is damaged"),
        ({"a": entry(0, 8, dtype="F99")}, "damaged"),
        ({"a": entry(0, 8, shape=[-2])}, "damaged"),
        ({"a": entry(0, 8, shape=[2.0])}, "damaged"),
        ({"a": entry(0, 8, shape=[3])}, "does not fit"),
        ({"a": entry(0, 8, shape=[10**30])}, "does not fit"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, "overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, "gap"),
        ({"a": entry(0, 64)}, "truncated: a ends at byte 64 of 16"),
        ({}, "no tensors"),
    ],
)
def test_damaged_safetensors_header_is_named(tmp_path: Path, header: Any, cause: str) -> None:
    path = header_file(tmp_path / "bad.safetensors", header)
    with pytest.raises(InputError, match=cause) as caught:
        open_source(str(path))
    assert str(path) in caught.value.message


def test_a_safetensors_header_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(InputError, match="here: the safetensors header cannot be read: 'utf-8' codec"):
        parse_header('{"__metadata__": {}}'.encode("utf-16"), None, "here")


@given(share=st.floats(0, 1, exclude_max=True))
def test_truncating_safetensors_anywhere_is_an_input_error(lone: Path, share: float) -> None:
    whole = lone.read_bytes()
    cut = lone.with_name("cut.safetensors")
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(SmolError):
        open_source(str(cut))


@given(at=st.integers(0, 2_000), value=st.integers(0, 255))
def test_flipping_a_safetensors_header_byte_raises_only_our_errors(lone: Path, at: int, value: int) -> None:
    data = bytearray(lone.read_bytes())
    data[at] = value
    flipped = lone.with_name("flipped.safetensors")
    flipped.write_bytes(data)
    try:
        source = open_source(str(flipped))
        list(source.weights.tensors() if source.weights else ())
    except SmolError:
        return
