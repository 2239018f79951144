"""The MODEL argument: kinds by content, what-ifs, recipes, and names that lead nowhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

from smolctl.config import ModelConfig, load_run_config, preset_names
from smolctl.config.load import presets_folder
from smolctl.errors import InputError, UsageError
from smolctl.inspection import count_source
from smolctl.model.weights import initialize
from smolctl.runs.root import require_run
from smolctl.sources import SourceKind, open_source

# The fields of SmolLM2-135M's pre-training recipe, as nanotron spells them.
NANOTRON: dict[str, Any] = {
    "checkpoints": {"checkpoint_interval": 2000, "checkpoints_path": "checkpoints"},
    "data_stages": [
        {
            "name": "stable phase",
            "start_training_step": 1,
            "data": {
                "dataset": {"dataset_folder": ["datasets/smollm2-corpus"], "dataset_weights": [1.0]},
                "num_loading_workers": 0,
                "seed": 8,
            },
        }
    ],
    "general": {"project": "smollm2", "run": "smollm2-135M", "seed": 8},
    "model": {
        "dtype": "bfloat16",
        "init_method": {"std": 0.041666666666666664},
        "model_config": {
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 2048,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pad_token_id": None,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": 49152,
        },
    },
    "optimizer": {
        "clip_grad": 1.0,
        "learning_rate_scheduler": {
            "learning_rate": 0.003,
            "lr_decay_starting_step": 1600000,
            "lr_decay_steps": 400000,
            "lr_decay_style": "linear",
            "lr_warmup_steps": 2000,
            "lr_warmup_style": "linear",
            "min_decay_lr": 0,
        },
        "optimizer_factory": {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1.0e-08, "name": "adamW"},
        "weight_decay": 0.01,
    },
    "parallelism": {"dp": 64, "pp": 1, "tp": 1},
    "tokenizer": {"tokenizer_max_length": None, "tokenizer_name_or_path": "HuggingFaceTB/cosmo2-tokenizer"},
    "tokens": {
        "batch_accumulation_per_replica": 1,
        "micro_batch_size": 8,
        "sequence_length": 2048,
        "train_steps": 2000000,
    },
}


def nanotron_file(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "any.txt"
    path.write_text(yaml.safe_dump(content))
    return path


def test_nanotron_recipe_is_carried_over(tmp_path: Path) -> None:
    source = open_source(str(nanotron_file(tmp_path, NANOTRON)))
    assert source.kind is SourceKind.NANOTRON
    run = source.run
    assert run is not None
    assert run.model == source.config
    assert run.model.model_type == "llama"
    assert (run.model.rope_theta, run.model.max_position_embeddings) == (10_000.0, 2_048)
    assert (run.train.steps, run.train.batch_size, run.train.micro_batch_size) == (2_000_000, 512, 8)
    assert run.tokens_per_step == 1_048_576
    assert (run.train.gradient_clip, run.train.precision, run.train.seed) == (1.0, "bf16-mixed", 8)
    assert (run.optimizer.learning_rate, run.optimizer.betas) == (3e-3, (0.9, 0.95))
    assert (run.optimizer.eps, run.optimizer.weight_decay) == (1e-8, 0.01)
    schedule = run.schedule
    assert (schedule.name, schedule.warmup_steps) == ("wsd", 2_000)
    assert (schedule.decay_start, schedule.decay_steps) == (1_600_000, 400_000)
    assert schedule.min_learning_rate == 0.0
    assert run.tokenizer == "HuggingFaceTB/cosmo2-tokenizer"
    assert (run.data.seed, run.checkpoint.every) == (8, 2_000)


def test_nanotron_recipe_equals_our_preset(tmp_path: Path) -> None:
    run = open_source(str(nanotron_file(tmp_path, NANOTRON))).run
    ours = load_run_config("smollm2-135m-pretrain")
    assert run is not None
    assert (run.model, run.optimizer) == (ours.model, ours.optimizer)
    assert run.with_whole_steps().schedule == ours.with_whole_steps().schedule


def test_what_nanotron_says_beyond_our_recipe_is_reported(tmp_path: Path) -> None:
    problems = "\n".join(open_source(str(nanotron_file(tmp_path, NANOTRON))).problems)
    assert "parallelism.dp 64 is not carried over" in problems
    assert "datasets/smollm2-corpus" in problems


@pytest.mark.parametrize(
    ("fields", "feature"),
    [
        ({"is_llama_config": False}, "is_llama_config"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"is_mamba_config": True}, "is_mamba_config"),
        ({"is_starcoder2_config": True, "is_llama_config": False}, "is_starcoder2_config"),
        ({"no_rope_layer": 3, "is_qwen2_config": True, "attention_bias": True}, "attention_bias True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"moe_config": {"num_experts": 8}}, "moe_config"),
        ({"sliding_window_size": 8}, "sliding_window_size 8"),
        ({"attention_bias": True}, "attention_bias"),
        ({"key_of_next_year": 3, "another": "x"}, "another 'x', key_of_next_year 3 are"),
    ],
)
def test_nanotron_models_of_another_kind_are_refused(
    tmp_path: Path, fields: dict[str, Any], feature: str
) -> None:
    changed = {**NANOTRON, "model": {"model_config": {**NANOTRON["model"]["model_config"], **fields}}}
    source = open_source(str(nanotron_file(tmp_path, changed)))
    assert source.config is None
    assert feature in source.unsupported


@pytest.mark.parametrize("key", ["window_size", "sliding_window_size"])
def test_nanotron_models_that_cannot_be_run_are_counted(tmp_path: Path, key: str) -> None:
    changed = {**NANOTRON, "model": {"model_config": {**NANOTRON["model"]["model_config"], key: 4}}}
    source = open_source(str(nanotron_file(tmp_path, changed)))
    assert (source.config, source.run) == (None, None)
    assert count_source(source).totals.unique == 134_515_008


def test_keys_that_a_nanotron_recipe_leaves_out_get_its_defaults(tmp_path: Path) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    content = {"model": {"model_config": {"is_llama_config": True, **sizes}}}
    config = open_source(str(nanotron_file(tmp_path, content))).require_config()
    assert (config.tie_word_embeddings, config.rms_norm_eps) == (False, 1e-6)
    assert (config.max_position_embeddings, config.rope_theta) == (2_048, 10_000.0)
    assert (config.bos_token_id, config.eos_token_id, config.num_key_value_heads) == (1, 2, 4)


def test_what_of_a_nanotron_recipe_we_have_arrives_and_the_rest_is_named(tmp_path: Path) -> None:
    model = {**NANOTRON["model"]["model_config"], "_use_doc_masking": True, "z_loss_enabled": True}
    dataset = {"hf_dataset_or_datasets": {"org/a": 0.75, "org/b": 0.25}, "text_column_name": "content"}
    content = {
        **NANOTRON,
        "model": {"model_config": model},
        "data_stages": [{"data": {"dataset": dataset}}],
        "optimizer": {
            **NANOTRON["optimizer"],
            "weight_decay_exclude_named_params": [".*embedding.*"],
            "dream": 1,
        },
    }
    source = open_source(str(nanotron_file(tmp_path, content)))
    assert source.run is not None
    data = source.run.data
    assert (data.document_masking, data.source, data.weights) == (True, ("org/a", "org/b"), (0.75, 0.25))
    assert (data.text_field, source.run.train.z_loss) == ("content", 1e-4)
    assert not source.run.optimizer.decay_embeddings
    problems = "\n".join(source.problems)
    assert "nanotron decays norms too" in problems
    assert "optimizer.dream is ignored" in problems


def test_nanotrons_words_for_the_near_kin_are_read(tmp_path: Path) -> None:
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8_192}
    for fields, kind in (
        ({"is_qwen2_config": True, "no_rope_layer": 10}, "smollm3"),
        ({"is_qwen2_config": True, "attention_bias": True}, "qwen2"),
        ({"rope_scaling": {"rope_type": "llama3", **scaling}}, "llama"),
    ):
        model = {"model_config": {**NANOTRON["model"]["model_config"], **fields}}
        source = open_source(str(nanotron_file(tmp_path, {**NANOTRON, "model": model})))
        config = source.require_config()
        assert (config.model_type, source.run is not None) == (kind, True)
        if kind == "smollm3":  # layers 10, 20 and 30 have no rope
            assert [not config.rotates(layer) for layer in range(30)] == [not n % 10 for n in range(1, 31)]
        if kind == "llama":
            assert config.rope_scaling is not None
            assert "nanotron ignores rope_scaling" in "\n".join(source.problems)


@pytest.mark.parametrize(
    ("patterns", "tied", "embeddings_decay", "said"),
    [
        ([".*token_embedding.*"], True, False, "nanotron decays norms too"),
        ([".*lm_head.*"], True, False, "nanotron decays norms too"),
        ([".*token_embedding.*", ".*lm_head.*"], False, False, "can leave out norms, biases"),
        ([".*lm_head.*"], False, True, "can leave out norms, biases and the token table, and nothing else"),
        ([".*token_position_embeddings.*", ".*norm.*"], True, False, ""),
        ([".*mlp.*"], True, True, ".*mlp.*: here weight decay can leave out"),
        (["(a|b)+norm"], True, True, "(a|b)+norm: here weight decay can leave out"),
    ],
)
def test_what_a_nanotron_recipe_excludes_from_weight_decay_arrives_or_is_named(
    tmp_path: Path, patterns: list[str], tied: bool, embeddings_decay: bool, said: str
) -> None:
    optimizer = {**NANOTRON["optimizer"], "weight_decay_exclude_named_params": patterns}
    model = {"model_config": {**NANOTRON["model"]["model_config"], "tie_word_embeddings": tied}}
    source = open_source(str(nanotron_file(tmp_path, {**NANOTRON, "optimizer": optimizer, "model": model})))
    assert source.run is not None
    assert source.run.optimizer.decay_embeddings == embeddings_decay
    named = [problem for problem in source.problems if "decay" in problem]
    assert (said in named[0] and len(named) == 1) if said else not named


def test_a_nanotron_schedule_is_as_nanotron_computes_it(tmp_path: Path) -> None:
    """Keys that are left out have nanotron's defaults: the rate never falls below its peak without
    min_decay_lr, and the decay takes all steps but the warmup's, wherever it starts."""
    scheduler = {"learning_rate": 1e-3, "lr_warmup_steps": 100, "lr_warmup_style": "constant"}
    scheduler |= {"lr_decay_starting_step": 500, "lr_decay_style": "cosine"}
    content = {
        "model": {"model_config": {**NANOTRON["model"]["model_config"], "rope_interleaved": True}},
        "tokens": {**NANOTRON["tokens"], "train_steps": 1_000},
        "optimizer": {"adam_beta2": 0.99, "weight_decay": 0.1, "learning_rate_scheduler": scheduler},
        "data": {"dataset": {"dataset_folder": {"one": 0.25, "two": 0.75}}},
        "checkpoints": {"resume_checkpoint_path": "s3://bucket/step"},
        "parallelism": {"tp": 7},
        "doremi": {"ref_model": "x"},
    }
    source = open_source(str(nanotron_file(tmp_path, content)))
    run = source.run
    assert run is not None
    schedule = run.schedule
    assert (schedule.warmup_steps, schedule.decay_start, schedule.decay_steps) == (0, 500, 900)
    assert (schedule.min_learning_rate, run.optimizer.betas[1]) == (1e-3, 0.99)
    assert (run.train.seed, run.data.seed) == (42, 42)
    problems = "\n".join(source.problems)
    for said in ("lr_decay_style cosine becomes linear", "'s3://bucket/step'", "doremi is ignored"):
        assert said in problems
    assert "pads the vocabulary to 49,154 tokens" in problems
    assert "rows of q_proj and k_proj in another order" in problems
    assert "one (0.25), two (0.75): folders of tokens" in problems


def test_a_nanotron_sequence_that_exceeds_the_context_does_not_hinder_the_count(tmp_path: Path) -> None:
    tokens = {**NANOTRON["tokens"], "sequence_length": 4_096}
    source = open_source(str(nanotron_file(tmp_path, {**NANOTRON, "tokens": tokens})))
    assert (source.run, count_source(source).totals.unique) == (None, 134_515_008)
    assert "longer than the model's context" in source.problems[-1]


def test_nanotron_with_missing_sections_opens(tmp_path: Path) -> None:
    source = open_source(str(nanotron_file(tmp_path, {"model": NANOTRON["model"]})))
    assert source.config is not None


def test_senseless_nanotron_values_are_named(tmp_path: Path) -> None:
    changed = {**NANOTRON, "tokens": {**NANOTRON["tokens"], "micro_batch_size": "eight"}}
    with pytest.raises(InputError, match=r"tokens\.micro_batch_size"):
        open_source(str(nanotron_file(tmp_path, changed)))


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_key_value_heads", 0), ("tie_word_embeddings", "false"), ("_use_doc_masking", 1)],
)
def test_a_wrong_value_of_a_nanotron_model_is_not_taken_for_one_that_is_left_out(
    tmp_path: Path, key: str, value: object
) -> None:
    model = {"model_config": {**NANOTRON["model"]["model_config"], key: value}}
    with pytest.raises(InputError, match=key):
        open_source(str(nanotron_file(tmp_path, {**NANOTRON, "model": model})))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_model(name: str) -> None:
    source = open_source(name)
    assert source.kind is SourceKind.PRESET
    assert source.run == load_run_config(name)


def test_our_yaml_is_a_config(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("model: {num_hidden_layers: 2}\n")
    source = open_source(str(tmp_path / "mine"))
    assert source.kind is SourceKind.CONFIG
    assert source.config is not None
    assert source.config.num_hidden_layers == 2


@pytest.mark.parametrize("key", ["num_hidden_layers=12", "model.num_hidden_layers=12"])
def test_what_ifs_change_the_model(key: str) -> None:
    source = open_source("smollm2-135m", [key])
    assert source.config is not None
    assert source.config.num_hidden_layers == 12
    assert source.run is not None
    assert source.run.model == source.config


def test_what_ifs_on_a_config_are_what_train_would_build() -> None:
    settings = ["train.steps=7", "model.hidden_size=96"]
    assert open_source("nano", settings).run == load_run_config("nano", settings)


def test_what_ifs_on_weights_are_for_counting_only(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1
    )
    path = tmp_path / "model.safetensors"
    save_file(initialize(config, seed=1).state_dict(), path)
    source = open_source(str(path), ["hidden_size=128", "num_attention_heads=2"])
    assert source.config is not None
    assert (source.config.hidden_size, source.config.head_dim) == (128, 64)
    assert (source.tensors, source.weights) == (None, None)
    with pytest.raises(UsageError, match="no training recipe"):
        open_source(str(path), ["train.steps=3"])


def test_unknown_what_ifs_are_named_with_a_suggestion() -> None:
    for setting in ("num_hiden_layers=3", "model.num_hiden_layers=3"):
        with pytest.raises(InputError, match="num_hiden_layers") as caught:
            open_source("nano", [setting])
        assert "num_hidden_layers" in caught.value.hint


@pytest.mark.parametrize(
    ("model", "cause", "hint"),
    [
        ("smolm2-135m", "no preset or file", "smollm2-135m"),
        ("nowhere/model.gguf", "no such file", "Give a preset"),
        ("Once upon a time " * 100, "no such file", "Give a preset"),
        ("./nowhere", "no such file", "Give a preset"),
        ("nowhere", "no preset or file", "Give a preset"),
        ("runs/nope", "no such run", "smolctl train"),
    ],
)
def test_names_that_lead_nowhere_are_explained(
    model: str, cause: str, hint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=cause) as caught:
        open_source(model)
    assert hint in caught.value.hint


def test_a_run_named_without_its_folder_and_models_inside_a_folder_are_offered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/mine-001")
    run.mkdir(parents=True)
    shutil.copy(presets_folder() / "nano.yaml", run / "config.yaml")
    for name in ("mine-001", "mine-001@300", "mine-001@best"):
        with pytest.raises(InputError) as caught:
            open_source(name)
        assert caught.value.hint == f"Did you mean runs/{name}?"
    with pytest.raises(InputError) as caught:
        require_run(Path("mine-001"))
    assert caught.value.hint == "Did you mean runs/mine-001?"
    with pytest.raises(InputError, match="contains no model") as caught:
        open_source("runs")
    assert caught.value.hint == "Name one of the models in it: runs/mine-001."


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "the file is empty"),
        (b"GGU", "not a config"),
        (b"GGUF", "truncated"),
        (b"\x00\x01\x02\x03", "no known model file"),
        (b"\xff\xfe\xfd" * 100, "no known model file"),
        (b"just words", "not a config"),
        (b"a: [1", "line 1"),
        (b"{not json", "not JSON"),
        (b"[1, 2]", "not a config"),
    ],
)
def test_files_that_are_no_model_are_named(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "model.gguf"  # the name says nothing
    path.write_bytes(content)
    with pytest.raises(InputError, match=cause) as caught:
        open_source(str(path))
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_folder_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"contains no model.*notes\.txt"):
        open_source(str(tmp_path))


def test_config_json_under_another_name_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.txt"
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 100}))
    source = open_source(str(path))
    assert source.config is not None
    assert source.config.vocab_size == 100


def test_headers_and_configs_are_opened_without_torch(tmp_path: Path) -> None:
    save_file(initialize(ModelConfig(num_hidden_layers=1), seed=1).state_dict(), tmp_path / "m.safetensors")
    nanotron_file(tmp_path, NANOTRON)
    code = (
        "import sys; from smolctl.sources import open_source\n"
        f"for model in ('nano', {str(tmp_path / 'm.safetensors')!r}, {str(tmp_path / 'any.txt')!r}):\n"
        "    assert open_source(model).config\n"
        "print({'torch', 'transformers', 'huggingface_hub', 'safetensors', 'gguf'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
