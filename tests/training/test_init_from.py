"""`--init-from`: weights keep their shape and their tokenizer, and nothing that is asked for is dropped."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from smolctl.config import load_run_config
from smolctl.data.tokenizer.tokenizer import load_tokenizer, train_tokenizer
from smolctl.errors import ExitCode, InputError
from smolctl.runs.events import Event, Step
from smolctl.runs.folder import RunFolder
from smolctl.sources import open_source
from smolctl.sources.provenance import provenance_of
from smolctl.training.prepare import Prepared, prepare
from smolctl.training.resume import ResumeOptions
from smolctl.training.train import train
from smolctl.training.verify import verify
from tests.support.processes import Called, Smolctl
from tests.support.tiny_models import write_folder
from tests.support.tiny_runs import assert_same_run, go_on, run, state

RECIPE = {
    "tokenizer": "train:280",
    "data": {"source": "notes.txt", "sequence_length": 32},
    "train": {"steps": 1, "batch_size": 2},
    "predictions": {"every": 0},
}


@pytest.fixture(autouse=True)
def _project(here: Path) -> None:
    Path("notes.txt").write_text(
        "".join(f"Other words: {number * number} zebras hum.\n" for number in range(400))
    )
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))


def texts() -> Iterator[str]:
    yield Path("notes.txt").read_text()


def tune(smolctl: Smolctl, *arguments: str, base: str = "runs/learned") -> Called:
    return smolctl("train", "recipe.yaml", "--init-from", base, "--out", "tuned", *arguments)


def is_refused(called: Called, *words: str) -> bool:
    assert called.code == ExitCode.BAD_INPUT, called.err
    assert not Path("tuned").exists()
    return all(word in called.err for word in words)


def test_the_weights_tokenizer_is_taken_in_place_of_one_to_train(smolctl: Smolctl) -> None:
    called = tune(smolctl)
    assert called.code == 0, called.err
    own = load_tokenizer("runs/learned/tokenizer")
    assert load_tokenizer("tuned/tokenizer").sha256 == own.sha256
    assert "tokenizer is that of runs/learned" in called.err


@pytest.mark.slow
def test_a_run_stops_where_the_model_stops_that_it_began_with(smolctl: Smolctl) -> None:
    folder = write_folder(Path("base"), context=32)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    assert tune(smolctl, base="base").code == 0
    for model in ("base", "tuned"):
        stops = smolctl("inspect-config", model, "--json").json["stops"]
        assert {2, 77} <= {stop["id"] for stop in stops}, model
    said = smolctl("sample", "tuned", "--prompt", "the", "--max-tokens", "1").err
    assert "generation_config" not in said  # it recommends nothing for sampling


@pytest.mark.parametrize("config", ["nano", "smollm2-135m"])
def test_a_preset_describes_new_weights_and_contradicts_none(smolctl: Smolctl, config: str) -> None:
    small = ("--set", "data.sequence_length=32", "--steps", "1", "--batch-size", "1")
    called = smolctl(
        "train", config, "--init-from", "runs/learned", "--data", "notes.txt", "--out", "tuned", *small
    )
    assert called.code == 0, called.err
    tuned, base = load_run_config("tuned/config.yaml"), load_run_config("runs/learned/config.yaml")
    assert tuned.model == base.model
    assert load_tokenizer("tuned/tokenizer").sha256 == load_tokenizer("runs/learned/tokenizer").sha256


def test_every_kind_of_model_with_weights_is_taken_and_what_is_quantized_is_refused(
    smolctl: Smolctl,
) -> None:
    to = ("--to", "int8,int8-dynamic,gguf-f16", "--no-measure")
    assert smolctl("quantize", "runs/llama@10", *to).code == 0
    made = Path("runs/llama/quantized")
    (gguf,), (checkpoint,) = made.glob("*.gguf"), made.glob("*/*.ckpt")
    write_folder(Path("folder"), context=32)
    config = load_run_config("recipe.yaml")
    for model in ("runs/llama@10", "runs/llama/checkpoints/final.ckpt", "folder", gguf):
        source = open_source(str(model))
        prepared = prepare(config, source, lambda _event: None)
        assert prepared.config.model.hidden_size == prepared.network.head_weight.shape[1]
        origin = prepared.config.init_from
        assert origin == provenance_of(source).model_copy(update={"sha256": origin and origin.sha256})
    for quantized in (made / "int8", checkpoint):
        hint = "Start from the model that was quantized: --init-from runs/llama@10."
        assert is_refused(
            tune(smolctl, base=str(quantized)), f"{quantized}: these weights are quantized", hint
        )


def test_a_tokenizer_to_train_that_was_asked_for_is_refused(smolctl: Smolctl) -> None:
    assert is_refused(tune(smolctl, "--tokenizer", "train:290"), "tokenizer train:290", "runs/learned")
    assert is_refused(tune(smolctl, "--set", "tokenizer=train:290"), "tokenizer train:290")


def test_another_tokenizer_is_refused_wherever_it_is_named(smolctl: Smolctl) -> None:
    train_tokenizer(texts(), 290).save(Path("other"))
    named = "tokenizer other: its ids mean other tokens"
    assert is_refused(tune(smolctl, "--tokenizer", "other"), named)
    Path("recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "tokenizer": "other"}))
    assert is_refused(tune(smolctl), named)


def test_a_tokenizer_with_the_same_ids_is_taken(smolctl: Smolctl) -> None:
    shutil.copytree("runs/learned/tokenizer", "same")
    called = tune(smolctl, "--tokenizer", "same")
    assert called.code == 0, called.err


def test_weights_that_are_not_finite_are_refused_before_a_folder_is_made(smolctl: Smolctl) -> None:
    path = write_folder(Path("broken"), context=32) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, path, {"format": "pt"})
    assert is_refused(tune(smolctl, base="broken"), "model.norm.weight holds NaN or infinite values")


def test_weights_without_a_tokenizer_need_the_name_of_theirs(smolctl: Smolctl) -> None:
    folder = write_folder(Path("bare"), context=32)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.move(folder / name, name)
    assert is_refused(tune(smolctl, base="bare"), "without a tokenizer", "--tokenizer")
    called = tune(smolctl, "--tokenizer", "tokenizer.json", base="bare")
    assert called.code == 0, called.err


@pytest.mark.parametrize(
    "setting",
    [
        "hidden_size=64",
        "num_hidden_layers=3",
        "position_embedding=rope",
        "max_position_embeddings=64",
        "rms_norm_eps=1e-6",
        "vocab_size=512",
        "tie_word_embeddings=false",
    ],
)
def test_a_shape_that_contradicts_the_weights_is_refused(smolctl: Smolctl, setting: str) -> None:
    key = setting.partition("=")[0]
    assert is_refused(tune(smolctl, "--set", f"model.{setting}"), f"--set model.{key}=")


def test_a_shape_that_the_weights_have_and_dropout_are_taken(smolctl: Smolctl) -> None:
    settings = ("--set", "model.hidden_size=32", "--set", "model.attention_dropout=0.5", "--json")
    called = tune(smolctl, *settings)
    assert called.code == 0, called.err
    assert load_run_config("tuned/config.yaml").model.attention_dropout == 0.5
    plain = smolctl("train", "recipe.yaml", "--init-from", "runs/learned", "--out", "plain", "--json")
    first, other = (
        next(event for event in map(json.loads, text.splitlines()) if event["event"] == "step")
        for text in (called.out, plain.out)
    )
    assert first["loss"] != other["loss"]  # the network drops what the config says


# --- the step that the weights come from --------------------------------------------------------------


def stopped_before_its_first_save(out: str, base: str = "folder") -> Path:
    """A run that fails at step 3."""

    def fail_at_three(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="power"):
        train(tuned(base), "tuned", Path(out), force=False, emit=fail_at_three)
    return Path(out)


def tuned(base: str) -> Prepared:
    config = load_run_config("recipe.yaml", flags={"train": {"steps": 5}, "validation": {"every": 0}})
    return prepare(config, open_source(base), lambda _event: None)


def test_a_run_stopped_before_its_first_save_begins_again_with_its_source(smolctl: Smolctl) -> None:
    write_folder(Path("folder"), context=32)
    whole = run(tuned("folder"), "whole")
    parts = stopped_before_its_first_save("parts")
    (start,) = RunFolder(parts).checkpoints()
    assert start.path.stat().st_size < Path("folder/model.safetensors").stat().st_size
    assert state(parts, 0)["state_dict"] == {}
    called = smolctl("sample", "parts", "--prompt", "a")
    assert called.code == ExitCode.BAD_INPUT
    assert f"the weights of step 0 are those of {Path('folder').absolute()}" in called.err
    go_on(parts)
    assert_same_run(whole, parts, 5)
    assert verify(parts, ResumeOptions(step=0), lambda _event: None).exact


def test_a_source_that_has_changed_or_is_gone_is_refused() -> None:
    write_folder(Path("folder"), context=32)
    parts = stopped_before_its_first_save("parts")
    path = Path("folder/model.safetensors")
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="folder has other weights now than the run began with"):
        go_on(parts)
    shutil.rmtree("folder")
    with pytest.raises(InputError, match=r"the run began with the weights of .*folder: no such file"):
        go_on(parts)
    other = stopped_before_its_first_save("other", "runs/learned@10")
    shutil.rmtree("runs/learned/checkpoints")
    with pytest.raises(InputError, match=r"learned@10: .* no checkpoint"):
        go_on(other)
