"""`smolctl inspect-config` as people and scripts call it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from smolctl.config import RunConfig, load_run_config, preset_names
from smolctl.config.dump import to_yaml
from smolctl.data.tokens.corpus import TokenizedCorpus, TokenStream
from smolctl.data.tokens.mixture import Mixture, Part
from smolctl.errors import InputError
from smolctl.inspection import inspect
from smolctl.sources import ModelSource, SourceKind, TokenizerFiles, open_source
from smolctl.sources.shapes import check_state
from smolctl.training.plan import make_plan
from tests.support.hub_server import COMMIT, HubRepository, HubServer
from tests.support.model_folders import llama_folder, other_architecture
from tests.support.processes import Smolctl


def write(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump(sections))
    return path


def nanotron_recipe(path: Path) -> Path:
    """The fields of SmolLM2's config_smollm2_135M.yaml that decide something."""
    return write(
        path,
        checkpoints={"checkpoint_interval": 2000},
        data_stages=[{"name": "stable phase", "data": {"seed": 8}}],
        general={"seed": 8},
        model={
            "dtype": "bfloat16",
            "init_method": {"std": 0.041666666666666664},
            "model_config": {
                "is_llama_config": True,
                "vocab_size": 49152,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "max_position_embeddings": 2048,
                "rope_theta": 10000.0,
                "rms_norm_eps": 1e-5,
                "hidden_act": "silu",
                "tie_word_embeddings": True,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": None,
            },
        },
        optimizer={
            "clip_grad": 1.0,
            "weight_decay": 0.01,
            "optimizer_factory": {"name": "adamW", "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8},
            "learning_rate_scheduler": {
                "learning_rate": 0.003,
                "lr_warmup_steps": 2000,
                "lr_decay_style": "linear",
                "lr_decay_starting_step": 1_600_000,
                "lr_decay_steps": 400_000,
                "min_decay_lr": 0,
            },
        },
        parallelism={"dp": 64},
        tokenizer={"tokenizer_name_or_path": "HuggingFaceTB/cosmo2-tokenizer"},
        tokens={
            "sequence_length": 2048,
            "micro_batch_size": 8,
            "batch_accumulation_per_replica": 1,
            "train_steps": 2_000_000,
        },
    )


def test_json_document_of_a_preset(smolctl: Smolctl) -> None:
    document = smolctl("inspect-config", "smollm2-135m-hub", "--json").json
    assert document["source"] == {
        "kind": "preset",
        "id": "smollm2-135m-hub",
        "revision": None,
        "bytes_fetched": 0,
    }
    assert document["config"]["rope_theta"] == 100_000
    assert document["config"]["max_position_embeddings"] == 8_192
    derived = document["derived"]
    assert derived["head_dim"] == 64
    assert derived["gqa_ratio"] == 3
    # keys and values × 30 layers × 3 heads × 64 numbers
    assert derived["kv_cache_bytes_per_token"] == {"float32": 46_080, "bfloat16": 23_040, "float16": 23_040}
    assert derived["parameters"]["unique"] == 134_515_008
    assert derived["training_flops_per_token"] == 3 * derived["forward_flops_per_token"]
    assert derived["tokens_per_step"] == 8 * 2_048
    assert derived["total_tokens"] == 5_000 * 8 * 2_048
    assert derived["tokens_per_parameter"] == pytest.approx(5_000 * 8 * 2_048 / 134_515_008)
    assert document["checkpoint"] is None


def test_memory_follows_batch_length_and_dtype(smolctl: Smolctl) -> None:
    def memory(*options: object) -> dict[str, Any]:
        document = smolctl("inspect-config", "smollm2-135m", *options, "--json").json
        return dict(document["derived"]["memory"])

    recipe = memory()
    assert (recipe["batch_size"], recipe["sequence_length"], recipe["dtype"]) == (2, 1_024, "float32")
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    assert recipe["total"] == sum(recipe[part] for part in parts)
    assert set(recipe["formulas"]) == set(parts)
    assert memory("--batch-size", 4)["activations"] == 2 * recipe["activations"]
    assert memory("--sequence-length", 512)["activations"] * 2 == recipe["activations"]
    assert memory("--dtype", "bfloat16")["optimizer"] * 2 == recipe["optimizer"]


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("model", ["smollm2-135m", "smollm2-135m-pretrain"])
def test_nothing_is_cut_off(
    smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch, width: int, model: str
) -> None:
    monkeypatch.setattr("smolctl.views.output.PIPE_WIDTH", width)
    out = smolctl("inspect-config", model).out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= width
    for fact in ("49,152", "46,080 B", "intermediate_size", "tokens per parameter"):
        assert fact in out


def test_nanotron_recipe_equals_the_shipped_preset(smolctl: Smolctl, tmp_path: Path) -> None:
    recipe = nanotron_recipe(tmp_path / "config_smollm2_135M.yaml")
    document = smolctl("inspect-config", recipe, "--json").json
    assert document["source"]["kind"] == "nanotron"
    assert document["derived"]["tokens_per_step"] == 1_048_576
    assert document["derived"]["total_tokens"] == 2_097_152_000_000
    difference = smolctl("inspect-config", recipe, "--against", "smollm2-135m-pretrain", "--json").json
    assert difference["config"] == []
    differing = {item["key"] for item in difference["recipe"]}
    assert not differing & {
        "tokenizer",
        "data.sequence_length",
        "data.seed",
        "train.steps",
        "train.batch_size",
        "train.micro_batch_size",
        "train.gradient_clip",
        "train.precision",
        "optimizer.learning_rate",
        "optimizer.betas",
        "optimizer.weight_decay",
        "schedule.warmup_steps",
        "schedule.decay_start",
        "schedule.decay_steps",
        "checkpoint.every",
    }


@pytest.mark.parametrize("preset", preset_names())
def test_yaml_of_a_preset_is_a_config_that_equals_it(smolctl: Smolctl, tmp_path: Path, preset: str) -> None:
    written = tmp_path / "written.yaml"
    written.write_text(smolctl("inspect-config", preset, "--yaml").out)
    assert load_run_config(str(written)) == load_run_config(preset)
    content = yaml.safe_load(written.read_text())
    for name, section in content.items():
        if isinstance(section, dict):
            assert set(section) == set(type(getattr(RunConfig(), name)).model_fields), name
    assert set(content) == set(RunConfig.model_fields)


def test_yaml_of_a_folder_trains_its_model(smolctl: Smolctl, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "llama")
    written = tmp_path / "written.yaml"
    written.write_text(smolctl("inspect-config", folder, "--yaml").out)
    config = load_run_config(str(written))
    assert config.model.num_hidden_layers == 3
    assert config.data.sequence_length == config.model.max_position_embeddings == 32


def test_yaml_keeps_awkward_values(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "tokenizer": "yes",
            "data": {"source": ["a: b", "#c", "it's", "ünï"]},
            "optimizer": {"eps": 1e-12, "learning_rate": 3e-4},
            "predictions": {"prompts": ["line\nbreak", "null", "3e-4", ""]},
            "model": {"eos_token_id": (1, 2), "pad_token_id": None},
        }
    )
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_run_config(str(path)) == config


def test_folder_is_checked_against_its_header(smolctl: Smolctl, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "llama")
    sound = smolctl("inspect-config", folder, "--json").json
    assert sound["checkpoint"]["matches"] is True
    assert sound["checkpoint"]["parameters"] == sound["derived"]["parameters"]["unique"]
    assert sound["checkpoint"]["tensors"] == 3 * 9 + 2
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 41}))
    broken = smolctl("inspect-config", folder, "--json").json
    assert broken["checkpoint"]["matches"] is False
    assert any("model.embed_tokens.weight" in p and "41" in p for p in broken["problems"])


@pytest.mark.parametrize(
    ("change", "fits", "said"),
    [
        (lambda values: values.reshape(-1), False, "the config says"),  # as long as the matrix, and none
        (lambda values: values.astype(np.int8), True, "integers or complex numbers"),
        (lambda values: values.astype(np.complex64), True, "integers or complex numbers"),
    ],
)
def test_what_a_load_would_refuse_is_a_problem_of_the_header(
    change: Callable[[np.ndarray], np.ndarray], fits: bool, said: str, tmp_path: Path
) -> None:
    path, name = llama_folder(tmp_path / "model") / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(path)
    save_file({**weights, name: change(weights[name])}, path)
    source = open_source(str(path.parent))
    report = inspect(source)
    assert report.checkpoint is not None
    assert report.checkpoint.matches is fits
    assert any(name in problem and said in problem for problem in report.problems)
    assert source.weights is not None
    with pytest.raises(InputError):
        check_state(source.require_config(), dict(source.weights.tensors()), "model")


def test_config_is_recovered_from_the_shapes_of_a_lone_safetensors(smolctl: Smolctl, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "llama", head_dim=64, hidden_size=32)
    (folder / "config.json").unlink()
    document = smolctl("inspect-config", folder / "model.safetensors", "--json").json
    config = document["config"]
    assert (config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (32, 4, 2)
    assert any("recovered" in problem for problem in document["problems"])


def test_another_architecture_is_shown_as_it_spells_itself(smolctl: Smolctl, tmp_path: Path) -> None:
    folder = other_architecture(tmp_path / "qwen", hidden_size=4)
    document = smolctl("inspect-config", folder, "--json").json
    assert document["supported"] is False
    assert document["derived"] is None
    assert document["config"]["model_type"] == "starcoder2"
    assert document["checkpoint"]["matches"] is None
    assert any("starcoder2" in problem for problem in document["problems"])
    assert smolctl("inspect-config", folder, "--yaml").code == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["schedule.warmup_steps=5000"], "warmup_steps 5,000 is not below train.steps 5,000"),
        (["eos_token_id=49152"], "eos_token_id 49152 is outside the vocabulary"),
        (["eos_token_id=[1,60000]"], "eos_token_id 60000 is outside the vocabulary"),
        (["schedule.min_learning_rate=1"], "min_learning_rate 1 is above"),
        (["schedule.decay_start=10"], "decay_start 10 comes before the end of the warmup"),
        (["position_embedding=rope", "residual_scale=1"], "hidden_size 576 is not a multiple of 256"),
    ],
)
def test_problems_are_named(smolctl: Smolctl, settings: list[str], words: str) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    document = smolctl("inspect-config", "smollm2-135m", *options, "--json").json
    assert any(words in problem for problem in document["problems"]), document["problems"]
    shown = " ".join(smolctl("inspect-config", "smollm2-135m", *options).out.split())
    assert words in shown


def test_types_of_llama_cpp_are_recommended_only_to_models_that_it_runs(smolctl: Smolctl) -> None:
    documents = {
        name: smolctl("inspect-config", name, "--json").json for name in ("smollm2-135m", "smollm2-135m-hub")
    }
    assert documents["smollm2-135m"]["problems"] == []
    assert "K-quants" in documents["smollm2-135m-hub"]["problems"][0]


def test_sound_recipe_of_fitting_sizes_has_no_problems(smolctl: Smolctl, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = write(tmp_path / "sound.yaml", model=sizes, schedule={"warmup_steps": 10})
    document = smolctl("inspect-config", path, "--json").json
    assert document["problems"] == []
    assert any("no pad token" in note for note in document["notes"])
    assert "no problems found" in smolctl("inspect-config", path).out


def test_a_decay_that_never_comes_is_a_note(smolctl: Smolctl) -> None:
    notes = smolctl("inspect-config", "smollm2-135m", "--json").json["notes"]
    assert any("does not fall within 5,000 steps" in note for note in notes)


def test_a_tokenizer_that_is_larger_than_the_model_is_a_problem() -> None:
    config = load_run_config("nano").model
    vocab = {f"t{index}": index for index in range(config.vocab_size)}
    added = [{"id": config.vocab_size, "content": "<|new|>"}]
    text = json.dumps({"model": {"vocab": vocab}, "added_tokens": added})
    files = TokenizerFiles(text, eos_token_id=7)
    source = ModelSource(SourceKind.FOLDER, "x", config, tokenizer_reader=lambda: files)
    problems = inspect(source).problems
    assert "the tokenizer's ids reach 4,096, the model's vocabulary ends at 4,095" in problems
    assert "eos_token_id: the config says 0, the tokenizer 7" in problems
    fitting = dataclasses.replace(
        files, tokenizer_json=json.dumps({"model": {"vocab": vocab}}), eos_token_id=0
    )
    source = dataclasses.replace(source, tokenizer_reader=lambda: fitting)
    assert not any("token" in problem for problem in inspect(source).problems)


def test_against_shows_only_what_differs(smolctl: Smolctl) -> None:
    document = smolctl("inspect-config", "smollm2-135m", "--against", "smollm2-135m-hub", "--json").json
    assert {item["key"] for item in document["config"]} == {
        "max_position_embeddings",
        "position_embedding",
        "rope_theta",
        "residual_scale",
    }
    assert {"key": "residual_scale", "this": 2**-0.5, "other": 1.0} in document["config"]
    assert document["same"] is False
    assert document["tensors"] is None
    out = smolctl("inspect-config", "smollm2-135m", "--against", "smollm2-135m-hub").out
    assert "position_embedding" in out
    assert "vocab_size" not in out


def test_against_compares_kinds_with_each_other_and_merges_layers(smolctl: Smolctl, tmp_path: Path) -> None:
    one = llama_folder(tmp_path / "one")
    two = llama_folder(tmp_path / "two", intermediate_size=32, num_hidden_layers=2)
    document = smolctl("inspect-config", one, "--against", two / "model.safetensors", "--json").json
    tensors = {item["key"]: (item["this"], item["other"]) for item in document["tensors"]}
    assert tensors["model.layers.0.mlp.up_proj.weight"] == ("24 × 16 F32", "32 × 16 F32")
    assert tensors["model.layers.2.mlp.up_proj.weight"] == ("24 × 16 F32", None)
    out = smolctl("inspect-config", one, "--against", two).out
    assert "model.layers.*.mlp.up_proj.weight (× 2)" in out


def test_a_model_does_not_differ_from_itself(smolctl: Smolctl, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "llama")
    assert smolctl("inspect-config", folder, "--against", folder, "--json").json["same"] is True


def test_an_inherited_tokenizer_is_no_difference(here: Path, smolctl: Smolctl) -> None:
    trained = smolctl(
        "train", "--init-from", "runs/llama", "--data", "corpus", "--steps", 1, "--out", "child"
    )
    assert trained.code == 0, trained.err
    recipes = [yaml.safe_load(Path(run, "config.yaml").read_text()) for run in ("runs/llama", "child")]
    assert recipes[0]["tokenizer"] != recipes[1]["tokenizer"]  # train:300, and none
    for command in (
        ("inspect-config", "runs/llama", "--against", "child"),
        ("compare", "runs/llama", "child"),
    ):
        called = smolctl(*command, "--json")
        assert called.code == 0, called.err
        found = called.json["recipe"] if "recipe" in called.json else called.json["pairs"][0]["differences"]
        keys = [item["key"] for item in found]
        assert "train.steps" in keys
        assert "tokenizer" not in keys


def test_a_hub_model_is_inspected_and_counted_without_its_weights(
    smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    folder = llama_folder(tmp_path / "llama", vocab_size=4_000, hidden_size=64)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    with HubServer() as hub:
        hub.repositories["org/tiny"] = HubRepository(files)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        document = smolctl("inspect-config", "org/tiny", "--json").json
        assert document["source"]["kind"] == "hub"
        assert document["source"]["revision"] == COMMIT
        assert 0 < document["source"]["bytes_fetched"] < len(files["model.safetensors"])
        assert document["checkpoint"]["matches"] is True
        counted = smolctl("count-params", "org/tiny", "--json").json
        assert counted["unique"] == document["checkpoint"]["parameters"]
        assert "fetched" in smolctl("count-params", "org/tiny").out
        hub.fails_with = 503
        failed = smolctl("count-params", "org/nothing")
        assert (failed.code, failed.out) == (4, "")
        assert len(failed.err.strip().splitlines()) == 2


@pytest.mark.real_weights
def test_the_real_gguf(smolctl: Smolctl, gguf_file: Path) -> None:
    document = smolctl("inspect-config", gguf_file, "--json").json
    assert document["source"]["kind"] == "gguf"
    assert document["config"]["rms_norm_eps"] == 1e-5
    assert document["checkpoint"]["dtypes"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert document["checkpoint"]["matches"] is True
    assert [p for p in document["problems"] if "K-quants" not in p] == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["smollm2-135m", "--sequence-length", "2048"], 2, "context of 1024"),
        (["smollm2-135m", "--dtype", "int3"], 2, "One of float32"),
        (["smollm2-135m", "--yaml", "--json"], 2, "--yaml"),
        (["smollm2-135m", "--batch-size", "0"], 2, "--batch-size"),
        (["smollm2-135m", "--against", "smollm3"], 3, "no preset"),
        (["nowhere.yaml"], 3, "no such file"),
    ],
)
def test_bad_calls_end_with_their_code(smolctl: Smolctl, arguments: list[str], code: int, words: str) -> None:
    called = smolctl("inspect-config", *arguments)
    assert called.code == code
    assert words in called.err
    assert called.out == ""


def test_yaml_that_is_no_config_is_named(smolctl: Smolctl, tmp_path: Path) -> None:
    path = tmp_path / "notes.yaml"
    path.write_text("- just\n- a list\n")
    called = smolctl("inspect-config", path)
    assert called.code == 3
    assert "notes.yaml" in called.err
    path.write_text("model: {hidden_size: 576\n")
    assert "line" in smolctl("inspect-config", path).err


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_memory_is_the_plans_of_train(optimizer: str, precision: str, checkpointed: bool) -> None:
    settings = [
        f"optimizer.name={optimizer}",
        f"train.precision={precision}",
        f"train.checkpoint_activations={checkpointed}",
        "train.micro_batch_size=4",
    ]
    source = open_source("nano", settings)
    assert source.run is not None
    report = inspect(source)
    assert report.derived is not None
    stream = TokenStream([], np.dtype("<u2"), 0, 10**6)
    corpus = TokenizedCorpus((), "", Mixture((Part(stream),)), None, 1, 0, 10**6, 10**6)
    plan = make_plan(source.run, 0, corpus, 1.0, 10**12, "cpu", source.run.micro_batch_size, 0)
    assert report.derived.memory.bytes == plan.memory


def test_what_changes_the_memory_changes_what_is_shown(smolctl: Smolctl) -> None:
    def memory(*settings: str) -> dict[str, Any]:
        options = [word for setting in settings for word in ("--set", setting)]
        return dict(smolctl("inspect-config", "nano", *options, "--json").json["derived"]["memory"])

    muon, adamw = memory(), memory("optimizer.name=adamw")
    assert muon["optimizer"] < adamw["optimizer"]
    assert memory("train.checkpoint_activations=true")["activations"] < muon["activations"]
    assert memory("train.precision=bf16-true")["weights"] * 2 == muon["weights"]
    assert "Muon" in smolctl("inspect-config", "nano").out
