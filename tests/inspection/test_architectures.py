"""Any architecture is counted: its config by transformers, its header by names; or it is not known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from smolctl.arithmetic import tensor_rows
from smolctl.inspection import count_source, inspect
from smolctl.inspection.architectures import _not_buildable
from smolctl.inspection.roles import Totals, total, with_tied_head
from smolctl.sources import open_source
from tests.support.model_folders import llama_folder

LLAMA = json.loads("""{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40,
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": true}""")
BODY = 3 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24 + 2 * 16) + 16


def bare(folder: Path, **values: Any) -> Any:
    """The count of a config.json with nothing beside it."""
    (folder / "config.json").write_text(json.dumps(values))
    return count_source(open_source(str(folder / "config.json")))


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        {"quantization_config": {"quant_method": "awq"}},
        {"quantization": {"bits": 4}},
        {"hidden_act": "swish"},
        {"hidden_act": "gelu"},
        {"sliding_window": 8},
    ],
    ids=str,
)
def test_what_changes_no_parameter_does_not_hinder_the_count(change: dict[str, Any], tmp_path: Path) -> None:
    report = bare(tmp_path, **LLAMA, **change)
    assert report.totals == Totals(BODY + 640, BODY + 1_280, BODY, BODY + 640)
    derived = inspect(report.source).derived
    assert derived is not None
    assert derived.kv_cache_bytes_per_token["float32"] == 2 * 3 * 2 * 4 * 4


@pytest.mark.parametrize(
    ("architecture", "unique", "naive"),
    [
        ("LlamaForSequenceClassification", BODY + 640 + 5 * 16, BODY + 640 + 5 * 16),
        ("LlamaModel", BODY + 640, BODY + 640),
    ],
)
def test_a_llama_is_counted_with_the_head_that_it_has(
    architecture: str, unique: int, naive: int, tmp_path: Path
) -> None:
    values = LLAMA | {"architectures": [architecture], "num_labels": 5}
    report = bare(tmp_path, **values)
    assert (report.totals.unique, report.totals.naive) == (unique, naive)


@pytest.mark.slow
def test_an_architecture_that_nobody_knows_has_no_totals(tmp_path: Path) -> None:
    report = bare(tmp_path, model_type="unheard", vocab_size=40, hidden_size=16)
    assert report.totals == Totals(None, None, None, None)
    assert report.partial
    assert [node.parameters for node in report.rows(2)] == [640]
    assert "unheard" in report.notes[0]


@pytest.mark.parametrize(
    "value",
    [
        {"num_hidden_layers": 10**9},
        {"num_local_experts": 10**9},
        {"n_layer": 10**6},
        {"backbone": "org/other"},
    ],
)
def test_a_config_that_no_model_has_is_not_built(value: dict[str, Any], tmp_path: Path) -> None:
    report = bare(tmp_path, model_type="mixtral", **value)
    assert report.totals.unique is None
    assert next(iter(value)) in report.notes[0]


def test_a_size_of_layers_or_channels_is_no_number_of_modules(tmp_path: Path) -> None:
    sizes = {"vocab_size_per_layer_input": 262_144, "depthwise_separable_out_channel": 1_024}
    assert _not_buildable({"model_type": "gemma3n_text", **sizes}) == ""


def test_a_llama_whose_sizes_are_left_out_says_what_is_assumed(tmp_path: Path) -> None:
    notes = bare(tmp_path, model_type="llama", hidden_dim=5_120, num_layers=40).notes
    assert "hidden_size is not given: 4,096 is assumed, as by transformers" in notes
    assert len(notes) == 5


@pytest.mark.slow
def test_transformers_says_what_it_assumes_and_which_tensors_are_tables(tmp_path: Path) -> None:
    bloom = bare(tmp_path, model_type="bloom", n_embed=16, num_heads=4)
    assert "n_layer is not given: 2 is assumed, as by transformers" in bloom.notes
    assert not any("hidden_size" in note for note in bloom.notes)  # n_embed says it
    sizes = {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    gpt = bare(tmp_path, model_type="openai-gpt", **sizes)
    layer = 4 * 8 * 8 + 4 * 8 + 8 * 8 * 8 + 5 * 8 + 4 * 8
    assert gpt.totals == Totals(layer + 56 * 8, layer + 96 * 8, layer, layer + 56 * 8)
    named = {key: LLAMA[key] for key in LLAMA if key != "model_type"}
    assert bare(tmp_path, **named).totals.unique == BODY + 640


def test_counting_a_llama_that_cannot_be_run_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"hidden_act": "gelu"}))
    code = (
        "import sys; from smolctl.sources import open_source; from smolctl.inspection import inspect;"
        f"inspect(open_source({str(tmp_path / 'config.json')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- headers: what a table is for is told by its name -------------------------------------------------

TABLE, LAYER = (96, 32), (32, 32)
FILES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], int, int]] = {
    # tensors, config; how often the table is in `naive`, and what `non_embedding` is beside the layer
    "bloom": ({"word_embeddings.weight": TABLE}, {"architectures": ["BloomForCausalLM"]}, 2, 0),
    "falcon with both": (
        {"transformer.word_embeddings.weight": TABLE, "lm_head.weight": TABLE},
        *({"architectures": ["FalconForCausalLM"], "model_type": "falcon"}, 2, 0),
    ),
    "mamba": ({"backbone.embeddings.weight": TABLE}, {"architectures": ["MambaForCausalLM"]}, 2, 0),
    "mamba2": (
        {"backbone.embeddings.weight": TABLE, "lm_head.weight": TABLE},
        *({"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2"}, 2, 0),
    ),
    "bert": (
        {
            "bert.embeddings.word_embeddings.weight": TABLE,
            "bert.embeddings.position_embeddings.weight": (64, 32),
            "bert.embeddings.LayerNorm.weight": (32,),
            "cls.predictions.bias": (96,),
            "cls.predictions.transform.dense.weight": LAYER,
        },
        *({"architectures": ["BertForPreTraining"]}, 2, 32 + 1_024),
    ),
    "a bert without a head": (
        {"embeddings.word_embeddings.weight": TABLE, "pooler.dense.weight": LAYER},
        *({"architectures": ["BertModel"]}, 1, 1_024),
    ),
    "roberta": (
        {"roberta.embeddings.word_embeddings.weight": TABLE, "lm_head.bias": (96,)},
        *({"architectures": ["RobertaForMaskedLM"]}, 2, 0),
    ),
    "modernbert": (
        {"model.embeddings.tok_embeddings.weight": TABLE, "head.dense.weight": LAYER, "decoder.bias": (96,)},
        *({"architectures": ["ModernBertForMaskedLM"]}, 2, 1_024),
    ),
    "t5": ({"shared.weight": TABLE}, {"architectures": ["T5ForConditionalGeneration"]}, 2, 0),
    "Meta's file": ({"tok_embeddings.weight": TABLE, "output.weight": TABLE}, {}, 2, 0),
    "a tied GGUF": ({"token_embd.weight": TABLE}, {"general.architecture": "qwen2"}, 2, 0),
    "a GGUF": ({"token_embd.weight": TABLE, "output.weight": TABLE}, {"general.architecture": "qwen2"}, 2, 0),
    "a picture's positions": (
        {
            "model.language_model.embed_tokens.weight": TABLE,
            "model.vision_tower.embeddings.position_embedding.weight": (64, 32),
            "model.visual.pos_embed": (1, 64, 32),
            "model.visual.cell.x_position_embeddings.weight": (64, 32),
            "lm_head.weight": TABLE,
        },
        *({"architectures": ["LlavaForConditionalGeneration"]}, 2, 0),
    ),
    "an encoder's GGUF": (
        {"token_embd.weight": TABLE, "token_types.weight": (2, 32)},
        *({"general.architecture": "bert", "bert.pooling_type": 1}, 1, 0),
    ),
}


def counted(tensors: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> Totals:
    rows = tensor_rows({"model.layers.0.dense.weight": LAYER, **tensors}.items())
    return total(with_tied_head(rows, config) or rows, config)


@pytest.mark.parametrize("kind", FILES)
def test_tables_positions_and_heads_are_known_by_name(kind: str) -> None:
    tensors, config, tables, body = FILES[kind]
    found = counted(tensors, config)
    sizes = {name: int(np.prod(shape)) for name, shape in tensors.items()}
    one = 96 * 32
    assert found.non_embedding == 1_024 + body
    stored = sum(1 for shape in tensors.values() if shape == TABLE)
    untied = sum(sizes.values()) - stored * one
    assert found.naive == 1_024 + untied + tables * one
    is_copy = "both" in kind
    assert found.unique == 1_024 + untied + (1 if is_copy else stored) * one


def test_a_table_of_an_unknown_name_makes_totals_unknown() -> None:
    found = counted({"model.glyphs.weight": TABLE}, {"vocab_size": 96, "architectures": ["GlyphForCausalLM"]})
    assert (found.naive, found.non_embedding) == (None, None)
    assert found.unique == 1_024 + 96 * 32


def test_a_mixture_has_active_parameters() -> None:
    experts = {f"model.layers.1.mlp.experts.{n}.up_proj.weight": LAYER for n in range(4)}
    tensors = {"model.embed_tokens.weight": TABLE, "lm_head.weight": TABLE, **experts}
    config = {"num_local_experts": 4, "num_experts_per_tok": 2}
    assert counted(tensors, config).active == 1_024 + 2 * 96 * 32 + 2 * 1_024
    assert counted(tensors, {"num_local_experts": 4}).active is None
    packed = {"blk.0.ffn_up_exps.weight": (4, 32, 32), "token_embd.weight": TABLE}
    of_gguf = {"general.architecture": "m", "m.expert_count": 4, "m.expert_used_count": 1}
    assert counted(packed, of_gguf).active == 1_024 + 96 * 32 + 1_024


def test_a_header_with_a_head_that_only_its_name_ties_is_counted_once(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    report = count_source(open_source(str(folder)))
    ours = count_source(open_source(str(llama_folder(tmp_path / "ours"))))
    assert report.totals == ours.totals


# --- split files ----------------------------------------------------------------------------------------


def split(folder: Path, parts: int) -> list[Path]:
    """A model of three tensors in as many files."""
    tensors = {"token_embd.weight": TABLE, "blk.0.ffn_up.weight": LAYER, "output_norm.weight": (32,)}
    paths = []
    for number, (name, shape) in enumerate(tensors.items()):
        path = folder / f"m-{number + 1:05}-of-{parts:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.count", parts)
        writer.add_uint16("split.no", number)
        writer.add_tensor(name, np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_any_part_of_a_split_gguf_counts_all_of_them(tmp_path: Path) -> None:
    paths = split(tmp_path, 3)
    for path in paths:
        report = count_source(open_source(str(path)))
        assert report.totals.unique == 96 * 32 + 1_024 + 32
        assert "split GGUF of 3 parts" in report.notes[0]
    paths[1].unlink()
    report = count_source(open_source(str(paths[2])))
    assert (report.totals.unique, report.partial) == (None, True)
    assert any("part 2 of 3" in note for note in report.notes)
    report = count_source(open_source(str(tmp_path)))  # of the folder without its second part
    assert report.totals.unique is None
    renamed = paths[0].rename(tmp_path / "model.gguf")
    report = count_source(open_source(str(renamed)))
    assert (report.totals.unique, report.partial) == (None, True)
    assert any("one of 3 parts, whose file name" in note for note in report.notes)


# --- the truth of transformers ---------------------------------------------------------------------------

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
ROPE = {**WIDE, "num_key_value_heads": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "BloomForCausalLM": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": SIZES,
    "MambaForCausalLM": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "Mamba2ForCausalLM": {**SIZES, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    **dict.fromkeys(("BertForMaskedLM", "BertModel", "RobertaForMaskedLM", "GPTNeoXForCausalLM"), WIDE),
    "T5ForConditionalGeneration": {
        "vocab_size": 96,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
    },
    **dict.fromkeys(("Qwen2ForCausalLM", "MistralForCausalLM", "LlamaForSequenceClassification"), ROPE),
    "Qwen3ForCausalLM": {**ROPE, "head_dim": 8, "tie_word_embeddings": True},
    "MixtralForCausalLM": {**ROPE, "num_local_experts": 4},
    "ModernBertForMaskedLM": {
        **WIDE,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", NETWORKS)
def test_config_and_header_are_counted_as_transformers_counts(architecture: str, tmp_path: Path) -> None:
    import transformers

    made = getattr(transformers, architecture)
    network = made(made.config_class(**NETWORKS[architecture]))
    network.save_pretrained(tmp_path)
    head, table = network.get_output_embeddings(), network.get_input_embeddings()
    unique = sum(tensor.numel() for tensor in network.parameters())
    tied = head is not None and head.weight is table.weight
    expected = (unique, unique + head.weight.numel() if tied else unique)
    header = count_source(open_source(str(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    config = count_source(open_source(str(tmp_path)))
    for report in (header, config):
        assert (report.totals.unique, report.totals.naive) == expected
    assert header.totals == config.totals
    is_known = architecture.startswith(("Llama", "Qwen", "Mistral"))
    assert (header.basis, config.basis) == (("config", "config") if is_known else ("header", "transformers"))
