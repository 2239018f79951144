"""How tokens are chosen: as the user says, else as the model's makers recommend, else by default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from smolctl.generation.load import load_model, usable_settings
from smolctl.generation.sampling import DEFAULT_SAMPLING, SamplingSettings, resolve_sampling
from tests.support.gguf_files import write_gguf
from tests.support.processes import Smolctl
from tests.support.tiny_models import tiny_network, write_folder

PROMPT = ("--prompt", "the cat", "--max-tokens", "12", "--threads", "1")
# At so high a temperature only top-k 1 gives the likeliest tokens.
LIKELIEST = {"do_sample": True, "temperature": 5.0, "top_k": 1, "repetition_penalty": 1.0}


def recommending(folder: Path, settings: dict[str, Any]) -> Path:
    path = write_folder(folder)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **settings}))
    return path


@pytest.mark.parametrize(
    ("own", "recommended", "expected"),
    [
        ({}, {}, DEFAULT_SAMPLING),
        ({}, {"temperature": 0.2, "top_k": 50}, SamplingSettings(0.2, 50, 0.95)),
        (
            {"temperature": 1.5, "top_p": 1.0},
            {"temperature": 0.2, "min_p": 0.1},
            SamplingSettings(1.5, 0, 1.0, 0.1),
        ),
        ({"temperature": 0.0}, {"repetition_penalty": 1.3, "top_k": 9}, SamplingSettings(0.0, 0, 0.95)),
        (
            {"temperature": 0.0, "repetition_penalty": 2.0},
            {"top_k": 9},
            SamplingSettings(0.0, 0, 0.95, 0.0, 2.0),
        ),
        ({}, {"temperature": 0.0, "repetition_penalty": 1.3}, SamplingSettings(0.0, 0, 0.95, 0.0, 1.3)),
    ],
)
def test_the_user_comes_before_the_model_and_the_model_before_the_default(
    own: dict[str, Any], recommended: dict[str, Any], expected: SamplingSettings
) -> None:
    assert resolve_sampling(own, recommended) == expected


@pytest.mark.parametrize(
    ("found", "usable", "unusable"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}, []),
        ({"temperature": 0.6}, {"temperature": 0.6}, []),
        ({"do_sample": False, "temperature": 0.6, "top_k": 50}, {"temperature": 0.0, "top_k": 50}, []),
        ({"do_sample": True}, {}, []),
        ({"top_k": "50", "min_p": 0.1}, {"min_p": 0.1}, ['"top_k" is not an integer']),
        ({"temperature": float("nan"), "top_p": 7}, {}, ["temperature nan is", "top-p 7 is"]),
    ],
)
def test_what_cannot_be_used_of_a_recommendation_is_named(
    found: dict[str, Any], usable: dict[str, Any], unusable: list[str]
) -> None:
    taken, reasons = usable_settings(found)
    assert taken == usable
    assert len(reasons) == len(unusable)
    assert all(reason.startswith(start) for reason, start in zip(reasons, unusable, strict=True))


def test_a_recommendation_is_followed_and_said_unless_the_user_says_otherwise(
    smolctl: Smolctl, tmp_path: Path
) -> None:
    model = recommending(tmp_path / "model", LIKELIEST)
    likeliest = smolctl("sample", model, *PROMPT, "--temperature", "0")
    followed = smolctl("sample", model, *PROMPT, "--seed", "5")
    assert followed.out == likeliest.out
    said = "sampling settings from generation_config.json: temperature 5, top k 1, repetition penalty 1."
    assert said in followed.err
    assert "generation_config.json" not in likeliest.err
    own = smolctl("sample", model, *PROMPT, "--seed", "5", "--top-k", "0")
    assert own.out != likeliest.out
    assert "generation_config.json: temperature 5, repetition penalty 1." in own.err
    chat = smolctl("sample", model, *PROMPT, "--chat")
    assert said in chat.err
    greedy = recommending(tmp_path / "greedy", {"do_sample": False})
    assert smolctl("sample", greedy, *PROMPT).out == likeliest.out


def test_a_line_of_a_file_comes_before_the_recommendation(smolctl: Smolctl, tmp_path: Path) -> None:
    model = recommending(tmp_path / "model", LIKELIEST)
    lines = [{}, {"top_k": 0}, {"temperature": 0}, {"top_k": 1, "temperature": 1}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "the cat", **line}) + "\n" for line in lines))
    done = smolctl("sample", model, "--jsonl", path, *PROMPT[2:])
    texts = [json.loads(line)["completions"][0]["text"] for line in done.out.splitlines()]
    likeliest = smolctl("sample", model, *PROMPT, "--temperature", "0").out.removesuffix("\n")
    assert [text == likeliest for text in texts] == [True, False, True, True]


def test_models_that_are_compared_get_the_same_settings(smolctl: Smolctl, tmp_path: Path) -> None:
    models = [recommending(tmp_path / name, LIKELIEST) for name in ("one", "two")]
    plain = write_folder(tmp_path / "plain")  # the same weights
    both = smolctl("sample", models[0], plain, *PROMPT, "--json")
    one, two = (model["completions"][0]["text"] for model in both.json["models"])
    assert one == two
    assert f"{models[0]}: the sampling settings in generation_config.json are ignored" in both.err


def test_a_gguf_recommends_too(tmp_path: Path) -> None:
    network = tiny_network(position_embedding="rope", residual_scale=1.0)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "general.sampling.temp": 0.2,
        "general.sampling.top_k": 40,
        "general.sampling.penalty_repeat": 1.1,
    }
    kind = gguf.GGMLQuantizationType.F32
    path = write_gguf(tmp_path / "a.gguf", network.config, network.state_dict(), kind, metadata)
    loaded = load_model(str(path))
    assert loaded.recommended == {"temperature": 0.2, "top_k": 40, "repetition_penalty": 1.1}
    assert loaded.recommended_in == "the GGUF's metadata"
