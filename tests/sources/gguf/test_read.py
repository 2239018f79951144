"""GGUF: the header, the order of rows, the unpacking, the tokenizer, and every way to be damaged."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from smolctl.config import ModelConfig
from smolctl.errors import InputError, SmolError
from smolctl.generation.engine import Engine
from smolctl.generation.engines import EngineOptions, make_engine
from smolctl.model.weights import initialize, load_network
from smolctl.sources import SourceKind, open_source
from smolctl.sources.arrays import Array
from smolctl.sources.gguf import blocks
from smolctl.sources.gguf.blocks import as_stored
from smolctl.sources.gguf.header import TENSOR_TYPES, read_header
from smolctl.sources.gguf.k_quants import K_QUANTS
from smolctl.sources.quantized.packed import PackedMatrix
from smolctl.sources.quantized.scaled import StoredTensor, dense
from tests.support.gguf_files import random_blocks, write_gguf

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    position_embedding="rope",
    rope_theta=100_000.0,
    residual_scale=1.0,
)
# All that gguf.quants reads.
BLOCK_TYPES = [
    kind.name
    for kind, (block, _) in gguf.GGML_QUANT_SIZES.items()
    if block > 1 and kind.name not in ("Q8_1", "Q8_K", "Q1_0")
]

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return {name: tensor.detach() for name, tensor in initialize(CONFIG, seed=3).state_dict().items()}


@pytest.fixture
def tiny(tmp_path: Path, state: State) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", CONFIG, state)


def test_config_is_read_from_llama_keys(tiny: Path) -> None:
    source = open_source(str(tiny))
    assert source.kind is SourceKind.GGUF
    assert source.config is not None
    assert source.config.model_dump(exclude={"bos_token_id", "eos_token_id"}) == CONFIG.model_dump(
        exclude={"bos_token_id", "eos_token_id"}
    )
    assert source.config.rms_norm_eps == 1e-5  # the file has 9.999999747378752e-06
    assert source.problems == ()


def test_float32_weights_come_back_bit_for_bit(tiny: Path, state: State) -> None:
    """Also Q and K, whose rows llama.cpp stores in another order."""
    loaded = dict(open_source(str(tiny)).require_weights().tensors())
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_untied_head_is_read(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"tie_word_embeddings": False})
    network = initialize(config, seed=4)
    path = write_gguf(tmp_path / "untied.gguf", config, network.state_dict())
    loaded = load_network(open_source(str(path)))
    assert not loaded.config.tie_word_embeddings
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(tokens), network.eval()(tokens))


def test_head_size_other_than_width_by_heads_is_read(tmp_path: Path) -> None:
    config = ModelConfig(**{**CONFIG.model_dump(), "head_dim": 32})
    path = write_gguf(tmp_path / "wide.gguf", config, initialize(config, seed=5).state_dict())
    source = open_source(str(path))
    assert source.config is not None
    assert source.config.head_dim == 32
    assert source.problems == ()


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_packed_weights_equal_the_gguf_package(tmp_path: Path, state: State, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    path = write_gguf(tmp_path / "packed.gguf", CONFIG, state, kind)
    loaded = dict(open_source(str(path)).require_weights().tensors())
    for key, tensor in state.items():
        stored = kind if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        expected = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), stored), stored)
        assert np.array_equal(loaded[key].numpy(), expected), key


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", *sorted(set(BLOCK_TYPES) - K_QUANTS.keys())])
def test_every_type_unpacks_as_the_gguf_package_does(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(kind).integers(0, 256, (6, 8 * size), dtype=np.uint8)
    if name in BLOCK_TYPES:
        raw[:, 1::size] &= 0x3F  # keep the float16 scales finite
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        expected = np.ascontiguousarray(gguf.quants.dequantize(raw, kind), dtype=np.float32)
        ours = dense(as_stored(raw, name))
    both_nan = np.isnan(ours) & np.isnan(expected)
    assert ours.shape == expected.shape
    assert ((ours == expected) | both_nan).all()


@pytest.mark.parametrize("name", K_QUANTS)
def test_k_quants_keep_their_values_and_round_their_scales(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]

    def both(factors: Sequence[float]) -> tuple[StoredTensor, Array]:
        raw = random_blocks(40, 512, kind, factors)
        return as_stored(raw, name), gguf.quants.dequantize(raw, kind)

    exact, expected = both([2**-9, 2**-12])  # times an integer of up to 8 bits: no rounding
    assert np.array_equal(dense(exact), expected)
    rounded, expected = both(np.random.default_rng(0).uniform(1e-5, 1e-3, 99).tolist())
    assert isinstance(rounded, PackedMatrix)
    largest = rounded.largest().repeat(rounded.group, axis=1)  # of scale × value and of an offset, in part
    assert (np.abs(dense(rounded) - expected) <= 3 * 2**-11 * largest).all()
    large, expected = both([60_000.0])  # a float16 holds no more than 65,504
    assert np.array_equal(dense(large), expected)


@pytest.mark.parametrize("name", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", *K_QUANTS])
def test_integers_take_about_as_much_memory_as_in_the_file(name: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    raw = np.zeros((4, 512 // block * size), np.uint8)
    stored = as_stored(raw, name)
    assert isinstance(stored, PackedMatrix)
    most = {"Q2_K": 2.3, "Q3_K": 1.75}.get(name, 1.4)  # values of 2 and 3 bits are held in 4
    assert stored.bytes <= most * raw.nbytes


def log_probabilities(engine: Engine, parts: list[list[int]]) -> torch.Tensor:
    cache = engine.allocate(1, 32)
    logits = np.concatenate([engine.forward([part], cache, every=True) for part in parts])
    return torch.from_numpy(logits).double().log_softmax(-1)


@pytest.mark.parametrize("name", ["Q5_0", "Q5_1", *K_QUANTS])
def test_a_quantized_gguf_runs_at_its_size_as_if_unpacked(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"hidden_size": 256, "head_dim": 64, "intermediate_size": 256})
    kind = gguf.GGMLQuantizationType[name]
    path = write_gguf(tmp_path / "k.gguf", config, initialize(config, seed=6).state_dict(), kind)
    source = open_source(str(path))
    engine = make_engine(source, EngineOptions(threads=1))
    in_file = sum(tensor.bytes for tensor in source.tensors or () if len(tensor.shape) > 1)
    assert engine.weight_bytes <= 2.3 * in_file
    assert engine.precision == {"Q5": "int5", "Q6": "int8"}.get(name[:2], "int4")
    for table in ("K_QUANTS", "PACKED"):
        monkeypatch.setattr(blocks, table, {})
    unpacked = make_engine(source, EngineOptions(threads=1))
    assert unpacked.precision == "float32"
    prompt = list(range(1, 31))
    expected = log_probabilities(unpacked, [prompt])
    few, ones = [prompt[at : at + 3] for at in range(0, 30, 3)], [[token] for token in prompt]
    whole, by_few, one_by_one = (log_probabilities(engine, parts) for parts in ([prompt], few, ones))
    for found in (whole, one_by_one):
        assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-4
    assert torch.equal(by_few, one_by_one)


def test_the_sizes_of_all_types_are_those_of_the_gguf_package() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert theirs == TENSOR_TYPES


TOKENS = ["<|end|>", "<|user|>", *map(chr, range(97, 123)), "Ġ", "ab", "1", "2"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 4, *[1] * (len(TOKENS) - 2)],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{{ messages }}",
}


def test_tokenizer_is_rebuilt_from_the_metadata(tmp_path: Path, state: State) -> None:
    path = write_gguf(tmp_path / "t.gguf", CONFIG, state, metadata=TOKENIZER)
    files = open_source(str(path)).read_tokenizer()
    assert files is not None
    assert (files.bos_token_id, files.eos_token_id, files.chat_template) == (0, 0, "{{ messages }}")
    tokenizer = Tokenizer.from_str(files.tokenizer_json)
    assert tokenizer.encode("ab c12<|end|><|user|>").tokens == [
        "ab",
        "Ġ",
        "c",
        "1",
        "2",
        "<|end|>",
        "<|user|>",
    ]
    assert tokenizer.decode(tokenizer.encode("ab c12").ids) == "ab c12"


def test_a_file_of_the_vocabulary_alone_is_described_and_not_run(tmp_path: Path) -> None:
    source = open_source(str(write_gguf(tmp_path / "vocab.gguf", CONFIG, {}, metadata=TOKENIZER)))
    tokens = TOKENIZER["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert source.require_config().vocab_size == len(tokens)
    assert source.read_tokenizer()
    assert [assumed.split()[0] for assumed in source.assumptions] == ["tie_word_embeddings"]
    with pytest.raises(InputError, match="no weights"):
        source.require_weights()


def test_bos_is_put_first_where_the_file_asks_for_it(tmp_path: Path, state: State) -> None:
    metadata = {**TOKENIZER, "tokenizer.ggml.add_bos_token": True}
    files = open_source(
        str(write_gguf(tmp_path / "t.gguf", CONFIG, state, metadata=metadata))
    ).read_tokenizer()
    assert files is not None
    assert Tokenizer.from_str(files.tokenizer_json).encode("ab").tokens == ["<|end|>", "ab"]


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer model bert"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer tekken"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer is damaged"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer is damaged"),
        ({"tokenizer.ggml.merges": ["ab"]}, "tokenizer is damaged"),
        ({"tokenizer.ggml.merges": [1]}, "tokenizer is damaged"),
        ({"tokenizer.ggml.tokens": 7}, "tokenizer is damaged"),
        ({"tokenizer.ggml.bos_token_id": 999, "tokenizer.ggml.add_bos_token": True}, "tokenizer is damaged"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_are_refused_by_name(
    tmp_path: Path, state: State, changed: dict[str, object], cause: str
) -> None:
    path = write_gguf(tmp_path / "t.gguf", CONFIG, state, metadata={**TOKENIZER, **changed})
    with pytest.raises(InputError, match=cause):
        open_source(str(path)).read_tokenizer()


@pytest.mark.parametrize(
    ("metadata", "feature"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling yarn"),
        ({"llama.rope.scaling.type": "linear"}, "rope scaling linear"),
        ({"llama.rope.scaling.factor": 4.0}, "rope scaling linear"),
        ({"llama.rope.dimension_count": 8}, "partial rotation"),
        ({"llama.expert_count": 8}, "expert_count 8"),
        ({"llama.attention.sliding_window": 128}, "sliding_window 128"),
        ({"llama.logit_scale": 2.0}, "logit_scale"),
        ({"llama.attention.scale": 0.5}, "attention.scale"),
        ({"llama.attention.causal": False}, "attention to later tokens"),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv that is not one number"),
        ({"llama.embedding_length": "wide"}, "embedding_length that is not one number"),
        ({"split.count": "three"}, "split GGUF of three parts"),
        ({"split.count": 3}, "split GGUF of 3 parts"),
    ],
)
def test_features_that_the_network_lacks_are_refused_by_name(
    tmp_path: Path, state: State, metadata: dict[str, object], feature: str
) -> None:
    path = tmp_path / "feature.gguf"
    config = CONFIG
    write_gguf(
        path, config, state, metadata={k: v for k, v in metadata.items() if "dimension_count" not in k}
    )
    if "llama.rope.dimension_count" in metadata:
        data = bytearray(path.read_bytes())
        at = data.index(b"llama.rope.dimension_count") + len(b"llama.rope.dimension_count") + 4
        data[at : at + 4] = struct.pack("<I", 8)
        path.write_bytes(data)
    source = open_source(str(path))
    assert source.config is None
    assert feature in source.unsupported
    with pytest.raises(InputError, match="not supported"):
        source.require_config()
    assert source.tensors  # count-params still counts them


def test_a_file_without_a_size_is_counted_and_not_run(tmp_path: Path, state: State) -> None:
    path = write_gguf(tmp_path / "x.gguf", CONFIG, state)
    path.write_bytes(path.read_bytes().replace(b"llama.context_length", b"llama.context_lengtx"))
    source = open_source(str(path))
    assert "without llama.context_length" in source.unsupported
    assert source.tensors


def test_another_architecture_is_refused_by_name(tmp_path: Path, state: State) -> None:
    path = write_gguf(tmp_path / "qwen.gguf", CONFIG, state, architecture="gemma")
    source = open_source(str(path))
    assert source.config is None
    assert "gemma" in source.unsupported


def test_missing_and_misshaped_tensors_are_named(tmp_path: Path, state: State) -> None:
    broken = {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}
    broken["model.layers.1.mlp.up_proj.weight"] = torch.zeros(32, 64)
    problems = open_source(str(write_gguf(tmp_path / "broken.gguf", CONFIG, broken))).problems
    assert "missing model.norm.weight" in problems
    assert any("model.layers.1.mlp.up_proj.weight is [32, 64]" in problem for problem in problems)


def edited(path: Path, at: int, value: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("at", "value", "cause"),
    [
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack("<I", 99), "version 99"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 60), "damaged header"),
        (16, struct.pack("<Q", 1 << 60), "damaged header"),
        (24, struct.pack("<Q", 1 << 62), "truncated"),
    ],
)
def test_damaged_header_is_named(tiny: Path, at: int, value: bytes, cause: str) -> None:
    with pytest.raises(InputError, match=cause) as caught:
        open_source(str(edited(tiny, at, value)))
    assert str(tiny) in caught.value.message
    assert caught.value.hint


def test_strings_that_end_within_the_length_of_one_are_refused(tmp_path: Path) -> None:
    """The header has nothing behind them: no later read would find the end of the file."""
    header = (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2)
    )
    path = tmp_path / "cut.gguf"
    path.write_bytes(header + struct.pack("<Q", 6) + b"abcdef" + b"\0" * 4)
    with pytest.raises(InputError, match="truncated: k has 2 strings"):
        read_header(path)


def test_truncated_gguf_is_named_and_refused(tiny: Path) -> None:
    whole = tiny.read_bytes()
    tiny.write_bytes(whole[:-40])
    with pytest.raises(InputError, match="truncated"):
        open_source(str(tiny))


@given(share=st.floats(0, 1, exclude_max=True))
def test_truncating_anywhere_is_an_input_error(tiny: Path, share: float) -> None:
    whole = tiny.read_bytes()
    cut = tiny.with_name("cut.gguf")
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(SmolError):
        dict(open_source(str(cut)).require_weights().tensors())


@given(at=st.integers(0, 2_500), value=st.integers(0, 255))
def test_flipping_a_header_byte_raises_nothing_but_our_errors(tiny: Path, at: int, value: int) -> None:
    data = bytearray(tiny.read_bytes())
    data[at] = value
    flipped = tiny.with_name("flipped.gguf")
    flipped.write_bytes(data)
    with contextlib.suppress(SmolError):
        source = open_source(str(flipped))
        if source.weights is not None:
            dict(source.weights.tensors())
        source.read_tokenizer()


def test_file_that_shrinks_between_header_and_weights_is_refused(tiny: Path) -> None:
    weights = open_source(str(tiny)).require_weights()
    tiny.write_bytes(tiny.read_bytes()[:-40])
    with pytest.raises(InputError, match="truncated"):
        list(weights.tensors())


def test_header_and_tokenizer_need_no_torch(tmp_path: Path, state: State) -> None:
    path = write_gguf(tmp_path / "t.gguf", CONFIG, state, metadata=TOKENIZER)
    code = (
        "import sys; from smolctl.sources import open_source;"
        f"source = open_source({str(path)!r}); source.read_tokenizer();"
        "print(source.problems, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "() False False"


@pytest.mark.real_weights
def test_real_weights_equal_the_gguf_package(gguf_file: Path) -> None:
    header = read_header(gguf_file)
    loaded = open_source(str(gguf_file)).require_weights().tensors()
    data = np.memmap(gguf_file, mode="r")
    for tensor, (name, values) in zip(header.tensors, loaded, strict=True):
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        raw = data[tensor.offset : tensor.offset + tensor.bytes].reshape(rows, -1)
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.type]).reshape(tensor.shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            expected = expected.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(tensor.shape)
        assert np.array_equal(values.numpy().view(np.uint32), expected.view(np.uint32)), name


@pytest.mark.real_weights
def test_real_tokenizer_knows_chat_and_digits(gguf_file: Path) -> None:
    files = open_source(str(gguf_file)).read_tokenizer()
    assert files is not None
    tokenizer = Tokenizer.from_str(files.tokenizer_json)
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1
    assert tokenizer.encode("in 2025").tokens == ["in", "Ġ", "2", "0", "2", "5"]
    assert files.chat_template is not None
    assert files.eos_token_id == 2
    text = "Grüße, 世界! 👋\n\tdef f(x): return x**2"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
