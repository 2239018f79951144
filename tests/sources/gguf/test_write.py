"""GGUF files that we write: read back by us, by transformers and by llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smolctl.config import ModelConfig
from smolctl.data.tokenizer.bpe import train_bpe
from smolctl.errors import InputError, SmolError, UsageError
from smolctl.generation.engine import Engine
from smolctl.generation.load import load_model
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize, load_network
from smolctl.sources import open_source
from smolctl.sources.base import TokenizerFiles
from smolctl.sources.gguf import write as writer
from smolctl.sources.gguf.header import read_header
from smolctl.sources.gguf.write import SCHEMES, write_gguf
from tests.support.tiny_models import continue_prompt
from tests.support.tokenizer_kinds import CHATML, CORPUS, trained


def tiny(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "position_embedding": "rope",
        "residual_scale": 1.0,
        "rope_theta": 100_000.0,
    }
    return ModelConfig(**fields | changes)


def written(path: Path, scheme: str, config: ModelConfig | None = None) -> tuple[Transformer, Path]:
    network = initialize(config or tiny(), seed=1)
    path = path / f"tiny.{scheme}.gguf"
    write_gguf(network.config, network.state_dict().items(), trained(), scheme, path, "tiny")
    return network.eval().requires_grad_(False), path


def greedy(engine: Engine, ids: list[int], tokens: int = 24) -> list[int]:
    return continue_prompt(engine, ids, tokens)[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_reads_back_as_the_model(scheme: str, tied: bool, tmp_path: Path) -> None:
    network, path = written(tmp_path, scheme, tiny(tie_word_embeddings=tied))
    source = open_source(str(path))
    assert source.problems == ()
    back = load_network(source)
    assert back.config.model_dump(exclude=writer.NOT_IN_THE_FILE) == network.config.model_dump(
        exclude=writer.NOT_IN_THE_FILE
    )
    ids = torch.tensor([[1, 5, 7, 200, 30]])
    with torch.inference_mode():
        difference = (back(ids) - network(ids)).abs().max()
    assert difference < {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2, "q8_0": 2e-2}.get(scheme, 0.5)


@pytest.mark.parametrize("scheme", ["f32", "q8_0", "q4_0"])
def test_transformers_reads_the_same_greedy_tokens(scheme: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, path = written(tmp_path, scheme)
    ours = load_model(str(path))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ids = ours.tokenizer.encode("the cat saw 12 birds")
    with torch.inference_mode():
        expected = theirs.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=2
        )
    assert greedy(ours.engine, ids) == expected[0, len(ids) :].tolist()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert tokenizer("the cat saw 12 birds")["input_ids"] == ids


@pytest.mark.parametrize("scheme", ["f32", "q8_0"])
def test_llama_cpp_reads_the_same_tokens_and_logits(scheme: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    _, path = written(tmp_path, scheme)
    ours = load_model(str(path))
    theirs = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    for text in ("the cat saw 12 birds", "it's  over\n\n 345 trees", "<|im_start|>user"):
        ids = ours.tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
        theirs.reset()
        theirs.eval(ids)
        logits = ours.engine.forward([ids], ours.engine.allocate(1, 64), every=True)
        found = theirs.scores[: len(ids)]
        # llama.cpp also rounds activations, to 8 bits under q8_0 and its cache to float16.
        assert np.abs(found - logits).max() < {"f32": 5e-3, "q8_0": 5e-2}[scheme]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"do_sample": True, "temperature": 1, "top_k": 40}, {"temperature": 1.0, "top_k": 40}),
        ({"do_sample": False, "min_p": 0.05}, {"temperature": 0.0, "min_p": 0.05}),
        ({"top_p": "0.9", "top_k": -1, "temperature": float("nan"), "repetition_penalty": None}, {}),
    ],
)
def test_what_is_recommended_for_sampling_goes_along(
    found: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    network, files = initialize(tiny(), seed=1), replace(trained(), recommended=found)
    write_gguf(network.config, network.state_dict().items(), files, "f32", tmp_path / "a.gguf", "tiny")
    back = open_source(str(tmp_path / "a.gguf")).read_tokenizer()
    assert back is not None
    assert back.recommended == expected


def test_a_tied_head_is_stored_once_and_the_table_stays_at_eight_bits(tmp_path: Path) -> None:
    network = initialize(tiny(), seed=1)
    state = {**network.state_dict(), "lm_head.weight": network.state_dict()["model.embed_tokens.weight"]}
    write_gguf(network.config, state.items(), trained(), "q4_0", tmp_path / "a.gguf", "tiny")
    kinds = {tensor.name: tensor.type for tensor in read_header(tmp_path / "a.gguf").tensors}
    assert "output.weight" not in kinds
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"
    assert set(kinds.values()) == {"Q8_0", "Q4_0", "F32"}


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_the_pre_tokenizer_is_named_after_what_it_does(pre: str, tmp_path: Path) -> None:
    network, files = initialize(tiny(), seed=1), trained(pre)
    write_gguf(network.config, network.state_dict().items(), files, "f16", tmp_path / "a.gguf", "tiny")
    values = read_header(tmp_path / "a.gguf").metadata
    assert values["tokenizer.ggml.pre"] == pre
    assert values["tokenizer.chat_template"] == CHATML
    assert len(values["tokenizer.ggml.tokens"]) == 300  # filled up to the table's rows
    assert values["tokenizer.ggml.token_type"][:4] == (3, 3, 3, 1)
    assert values["tokenizer.ggml.token_type"][-1] == 5
    written = open_source(str(tmp_path / "a.gguf")).read_tokenizer()
    assert written is not None
    assert written.chat_template == CHATML


@pytest.mark.parametrize(
    ("changes", "scheme", "reason"),
    [
        ({"position_embedding": "learned"}, "f16", "learned positions"),
        ({"residual_scale": 0.5}, "f16", "residual_scale 0.5"),
        ({"intermediate_size": 80}, "q8_0", "intermediate_size 80"),
        ({}, "q4_k_m", "not known"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_with_the_reason(
    changes: dict[str, Any], scheme: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises((InputError, UsageError), match=reason):
        written(tmp_path, scheme, tiny(**changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["normalizer", "split"])
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(what: str, tmp_path: Path) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    backend = train_bpe(CORPUS, 290)
    if what == "normalizer":
        backend.normalizer = normalizers.NFC()
    else:
        split = pre_tokenizers.Split(Regex("[aeiou]"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False)])
    network = initialize(tiny(), seed=1)
    with pytest.raises(InputError, match="cannot go into a GGUF"):
        write_gguf(
            network.config,
            network.state_dict().items(),
            TokenizerFiles(backend.to_str()),
            "f16",
            tmp_path / "a.gguf",
            "tiny",
        )


def test_a_file_that_reads_back_wrong_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_it_is(_name: str, tensor: Tensor, _config: ModelConfig) -> Tensor:
        return tensor

    monkeypatch.setattr(writer, "_interleaved", as_it_is)
    with pytest.raises(SmolError, match=r"q_proj.weight is off by"):
        written(tmp_path, "q4_0")
    assert list(tmp_path.iterdir()) == []


def test_every_end_of_an_answer_is_in_the_file(tmp_path: Path) -> None:
    network, files = initialize(tiny(), seed=1), replace(trained(), end_token_ids=(0, 5, 7))
    state = network.state_dict().items()
    write_gguf(network.config, state, files, "q8_0", tmp_path / "ends.gguf", "ends")
    metadata = read_header(tmp_path / "ends.gguf").metadata
    ends = [metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")]
    assert ends == [0, 5, 7]
    back = open_source(str(tmp_path / "ends.gguf")).read_tokenizer()
    assert back is not None
    assert back.end_token_ids == (0, 5, 7)


@pytest.mark.slow
@pytest.mark.real_weights
@pytest.mark.parametrize("scheme", ["q8_0", "q4_1"])
def test_the_real_model_goes_through_unchanged(gguf_file: Path, scheme: str, tmp_path: Path) -> None:
    given = open_source(str(gguf_file))
    files = given.read_tokenizer()
    assert files is not None
    path = tmp_path / f"{scheme}.gguf"
    result = write_gguf(
        given.require_config(), given.require_weights().tensors(), files, scheme, path, "SmolLM2"
    )
    assert result.bits_per_weight == pytest.approx({"q8_0": 8.6, "q4_1": 5.8}[scheme], abs=0.2)
    theirs, ours = read_header(gguf_file), read_header(path)
    assert {tensor.name for tensor in ours.tensors} == {tensor.name for tensor in theirs.tensors}
    for key in ("pre", "model", "tokens", "merges", "token_type", "bos_token_id", "eos_token_id"):
        mine, reference = (header.metadata[f"tokenizer.ggml.{key}"] for header in (ours, theirs))
        simple = isinstance(mine, str | int)
        assert mine == reference if simple else list(mine) == list(reference), key
    one, two = load_model(str(gguf_file)), load_model(str(path))
    ids = one.tokenizer.encode("The capital of France is")
    assert two.tokenizer.encode("The capital of France is") == ids
    assert greedy(one.engine, ids, 8) == greedy(two.engine, ids, 8)
