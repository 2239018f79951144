"""`smolctl count-params` as people and scripts call it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.model_folders import llama_folder, other_architecture
from tests.support.processes import Smolctl


@pytest.mark.parametrize(
    ("preset", "unique", "naive", "non_embedding"),
    [
        ("smollm2-135m", 135_104_832, 163_416_384, 106_203_456),
        ("smollm2-135m-hub", 134_515_008, 162_826_560, 106_203_456),
    ],
)
def test_three_labelled_totals(
    smolctl: Smolctl, preset: str, unique: int, naive: int, non_embedding: int
) -> None:
    called = smolctl("count-params", preset)
    assert called.code == 0
    lines = called.out.splitlines()
    for label, number in (("unique", unique), ("naive", naive), ("non-embedding", non_embedding)):
        assert any(line.split()[:2] == [f"{number:,}", label] for line in lines), label
    counted = smolctl("count-params", preset, "--json").json
    assert (counted["unique"], counted["naive"], counted["non_embedding"]) == (unique, naive, non_embedding)


@pytest.mark.real_weights
def test_the_real_gguf_is_counted_from_its_header_and_agrees(smolctl: Smolctl, gguf_file: Path) -> None:
    counted = smolctl("count-params", gguf_file, "--json").json
    assert counted["unique"] == 134_515_008
    assert counted["naive"] == 162_826_560
    assert counted["non_embedding"] == 106_203_456
    assert counted["header_agrees"] is True
    assert "272 tensors" in smolctl("count-params", gguf_file).out


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 9])
def test_json_rows_have_their_keys_and_add_up_to_unique(smolctl: Smolctl, depth: int) -> None:
    counted = smolctl("count-params", "smollm2-135m", "--depth", depth, "--json").json
    keys = {"module", "shape", "copies", "formula", "parameters", "tied"}
    assert all(set(row) == keys for row in counted["rows"])
    assert sum(row["parameters"] for row in counted["rows"] if not row["tied"]) == counted["unique"]
    assert [row["module"] for row in counted["rows"] if row["tied"]] == ["lm_head"]


def test_depth_opens_the_layers(smolctl: Smolctl) -> None:
    def modules(depth: int) -> list[str]:
        rows = smolctl("count-params", "smollm2-135m", "--depth", depth, "--json").json["rows"]
        return [row["module"] for row in rows]

    assert modules(2) == [
        "model.embed_tokens",
        "model.embed_positions",
        "model.layers",
        "model.norm",
        "lm_head",
    ]
    assert "model.layers.*.self_attn" in modules(3)
    assert "model.layers.*.self_attn.q_proj" in modules(4)


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_nothing_is_cut_off(
    smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch, width: int, depth: int
) -> None:
    monkeypatch.setattr("smolctl.views.output.PIPE_WIDTH", width)
    out = smolctl("count-params", "smollm2-135m", "--depth", depth).out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= width
    words = " ".join(out.split())
    for row in smolctl("count-params", "smollm2-135m", "--depth", depth, "--json").json["rows"]:
        assert f"{row['parameters']:,}" in words
        assert row["formula"] in words, "the formula is reachable at every width"


def test_formulas_name_their_values(smolctl: Smolctl) -> None:
    out = smolctl("count-params", "smollm2-135m", "--depth", 4).out
    assert "num_attention_heads 9" in out
    assert "head_dim 64" in out


def test_what_if_changes_the_count_and_says_so(smolctl: Smolctl) -> None:
    twelve = ("count-params", "smollm2-135m", "--set", "num_hidden_layers=12")
    full = smolctl("count-params", "smollm2-135m", "--json").json["unique"]
    assert smolctl(*twelve, "--json").json["unique"] == full - 18 * 3_540_096
    assert "What if: num_hidden_layers=12" in smolctl(*twelve).out


def test_what_if_works_on_a_model_with_weights(smolctl: Smolctl, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "llama")
    one = smolctl("count-params", folder, "--set", "num_hidden_layers=1", "--json").json
    three = smolctl("count-params", folder, "--json").json
    assert one["unique"] < three["unique"]
    assert one["header_agrees"] is None


@pytest.mark.parametrize("tied", [True, False])
def test_folder_header_agrees_with_its_config(smolctl: Smolctl, tmp_path: Path, tied: bool) -> None:
    folder = llama_folder(tmp_path / "llama", tie_word_embeddings=tied)
    counted = smolctl("count-params", folder, "--json").json
    assert counted["header_agrees"] is True
    assert counted["naive"] - counted["unique"] == (40 * 16 if tied else 0)
    assert "agree with the config" in smolctl("count-params", folder).out


def test_a_header_that_contradicts_the_config_is_said(smolctl: Smolctl, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 25}))
    counted = smolctl("count-params", folder, "--json").json
    assert counted["header_agrees"] is False
    assert any("model.layers.0.mlp.gate_proj.weight" in note for note in counted["notes"])
    assert "does not agree" in smolctl("count-params", folder).out


def test_another_architecture_is_counted_from_its_header(smolctl: Smolctl, tmp_path: Path) -> None:
    folder = other_architecture(tmp_path / "qwen", tie_word_embeddings=True)
    called = smolctl("count-params", folder)
    assert called.code == 0
    assert "starcoder2" in called.out
    assert "cannot run this network" in " ".join(called.out.split())
    counted = smolctl("count-params", folder, "--depth", 6, "--json").json
    body = 3 * (16 + 4) + 32 + 4
    assert counted["counted"] == "header"
    assert counted["non_embedding"] == body
    assert counted["unique"] == body + 40
    assert counted["naive"] == body + 80, "the config says that the head is tied"
    copies = {row["module"]: row["copies"] for row in counted["rows"]}
    assert copies["model.layers.0-1.self_attn.q_proj.bias"] == 2


def test_packed_integers_are_not_passed_off_as_parameters(smolctl: Smolctl, tmp_path: Path) -> None:
    folder = other_architecture(tmp_path / "gptq")
    save_file({"model.layers.0.q.qweight": np.zeros((4, 4), np.int32)}, folder / "model.safetensors")
    counted = smolctl("count-params", folder, "--json").json
    assert [counted[key] for key in ("unique", "naive", "non_embedding", "active")] == [None] * 4
    assert any("is not known" in note for note in counted["notes"])
    assert "not known" in smolctl("count-params", folder).out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["smollm2-135"], 3, "Did you mean smollm2-135m?"),
        (["no/such/file.gguf"], 3, "no such file"),
        (["smollm2-135m", "--set", "num_hidden_layer=3"], 3, "Did you mean model.num_hidden_layers?"),
        (["smollm2-135m", "--set", "num_hidden_layers=-3"], 3, "num_hidden_layers"),
        (["smollm2-135m", "--set", "num_hidden_layers"], 2, "key=value"),
        (["smollm2-135m", "--depth", "0"], 2, "--depth"),
        ([], 2, "MODEL"),
    ],
)
def test_bad_calls_end_with_one_cause_one_remedy_and_their_code(
    smolctl: Smolctl, arguments: list[str], code: int, words: str
) -> None:
    called = smolctl("count-params", *arguments)
    assert called.code == code
    assert called.out == ""
    assert words in called.err
    assert len(called.err.strip().splitlines()) == 2
    error = json.loads(smolctl("count-params", *arguments, "--json").err)["error"]
    assert error["code"] == code
    assert error["message"]
    assert error["hint"]
