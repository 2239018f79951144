"""Answers that keep to a JSON schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from smolctl.errors import InputError
from smolctl.generation.complete import CompletionSettings, complete
from smolctl.generation.grammar import compile_schema
from smolctl.generation.sampling import SamplingSettings, distribution
from tests.support.processes import Smolctl
from tests.support.tiny_models import tiny_model, write_folder

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "sizes": {"type": "array", "items": {"type": "boolean"}},
    },
    "required": ["colour", "sizes"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_a_random_model_keeps_to_a_schema(temperature: float) -> None:
    model = tiny_model(context=300)
    grammar = compile_schema(SCHEMA, model.tokenizer, model.engine.config)
    sampling = SamplingSettings(temperature, repetition_penalty=1.5)  # which ends the list of sizes
    settings = CompletionSettings(120, 2, seed=1, sampling=sampling, grammar=grammar)
    result = complete(model.engine, model.tokenizer, model.prompt("the cat"), settings)
    for answer in result.completions:
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert any(answer.finish_reason == "stop" for answer in result.completions)
    # Probabilities are the model's own, whatever the schema allows.
    assert all(logprob < 0 for answer in result.completions for logprob in answer.logprobs)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "nonsense"}, "nonsense"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"patternProperties": {"^a": {}}}}}, "patternProperties"),
        ({"$ref": "#"}, "JSON schema"),
        ({"$ref": "https://example.org/schema.json"}, "example.org"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(schema: dict[str, object], reason: str) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match=reason):
        compile_schema(schema, model.tokenizer, model.engine.config)


def test_ids_that_no_token_has_are_never_allowed() -> None:
    model = tiny_model()
    size = model.tokenizer.vocab_size
    padded = model.engine.config.model_copy(update={"vocab_size": size + 40})
    constraint = compile_schema({"type": "string"}, model.tokenizer, padded).constraint()
    masked = constraint.mask(np.zeros(size + 40, np.float32))
    assert np.isneginf(masked[size:]).all()
    assert not np.isneginf(masked[:size]).all()


def test_a_property_may_be_called_as_a_keyword_is() -> None:
    model = tiny_model()
    schema = {"type": "object", "properties": {"patternProperties": {"type": "boolean"}}}
    compile_schema(schema, model.tokenizer, model.engine.config)


def test_sample_takes_a_schema_from_a_file(smolctl: Smolctl, tmp_path: Path) -> None:
    model, file, lines = write_folder(tmp_path / "m", context=300), tmp_path / "s.json", tmp_path / "p.jsonl"
    file.write_text(json.dumps({"enum": ["red", "blue"]}))
    lines.write_text('{"prompt": "the"}\n{"prompt": "a cat", "n": 2}\n')
    options = ("--json-schema", file, "--threads", "1")
    done = smolctl("sample", model, "--prompt", "the", "-n", "3", "--json", *options)
    assert all(one["text"] in ('"red"', '"blue"') for one in done.json["completions"])
    rows = map(json.loads, smolctl("sample", model, "--jsonl", lines, *options).out.splitlines())
    assert all(one["text"] in ('"red"', '"blue"') for row in rows for one in row["completions"])
    file.write_text('{"type": 5}')
    assert smolctl("sample", model, "--prompt", "the", *options).code == 3


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6, 1e6])
def test_no_temperature_leaves_the_numbers_of_float32(temperature: float) -> None:
    logits = tiny_model().engine.forward([[5]], tiny_model().engine.allocate(1, 2))[0]
    assert distribution(logits, SamplingSettings(temperature)).sum() == pytest.approx(1)
