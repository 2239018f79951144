from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smolctl.config.load import load_run_config, parse_settings, read_yaml
from smolctl.errors import LONGEST, InputError, SmolError, UsageError
from smolctl.outside import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_YAML_BYTES,
    checked,
    parse_json,
    parse_object,
    parse_yaml,
    read_file,
)

LAUGH = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    + [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    + ["train: {steps: *i}"]
)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("train: {steps: 2024-13-45}", "train.steps: .*got '2024-13-45'"),
        ("train: {steps: 2024-01-01}", "train.steps: .*got '2024-01-01'"),
        ('train: {steps: !!int ""}', "train.steps: '' is not a valid int"),
        ("train: {steps: !!float x}", "train.steps: 'x' is not a valid float"),
        ("train: {steps: !!bool x}", "train.steps: 'x' is not a valid bool"),
        ("train: {steps: !!timestamp x}", "train.steps: the tag .*timestamp is not supported"),
        ("train: {steps: !!python/object/apply:os.system [id]}", "os.system"),
        (f"train: {{steps: {'9' * 5_000}}}", "train.steps: a number of 5,000 digits"),
        (f"train: {'[' * 200}", r"train\..*nested more than 64 levels deep"),
        (f"train: {'- ' * 5_000}", "line 1"),
        (LAUGH, "expands to more than 20,000 values"),
        ("train: {steps: 1:30}", "train.steps: .*got '1:30'"),
        ("train: {steps: 5}\ntrain: {batch_size: 2}", "line 2: train: the key is given twice"),
        ("train: {steps: 5, steps: 6}", "train.steps: the key is given twice"),
        ('tokenizer: ""', "tokenizer: "),
        ("data: {source: ['']}", "data.source"),
        ("train: &a {steps: [*a]}", r"train.steps.0: \*a refers to a value that contains it"),
        ("x" * (MAX_YAML_BYTES + 1), "more than 1,000,000 bytes"),
    ],
    ids=lambda text: text[:30],
)
def test_no_yaml_gets_past_its_bounds(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=cause) as caught:
        load_run_config(str(path))
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_aliases_and_merges_of_sensible_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: &a {hidden_size: 64}\nother: {<<: *a, x: [*a, *a]}")
    size = {"hidden_size": 64}
    assert read_yaml(path) == {"model": size, "other": {**size, "x": [size, size]}}
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{<<: *second}", 2),
        ("{<<: {<<: *first, key: 2}}", 2),
        ("{<<: [*first, *second]}", 1),
        ("{<<: [*second, *first]}", 2),
        ("{key: 3, <<: [*second, *first]}", 3),
    ],
)
def test_of_a_merged_key_the_nearest_value_counts(text: str, key: int) -> None:
    given = f"first: &first {{key: 1, x: 1}}\nsecond: &second {{<<: *first, key: 2}}\nmerged: {text}"
    assert parse_yaml(given, "here")["merged"] == {"key": key, "x": 1}


@pytest.mark.parametrize("text", ["a: {<<: 3}", "a: {<<: [{<<: [1]}]}"])
def test_only_mappings_are_merged(text: str) -> None:
    with pytest.raises(InputError, match=r"a\.<<.*not a mapping"):
        parse_yaml(text, "here")


def test_numbers_are_those_that_people_read() -> None:
    text = "[010, +1_000, 0x10, 1e3, 1.5, 1:30, 1:30.5, .inf]"
    assert parse_yaml(text, "here") == [10, 1000, 16, 1000.0, 1.5, "1:30", "1:30.5", float("inf")]


@pytest.mark.parametrize("item", [f"train.steps={'9' * 5_000}", f"train.steps={'[' * 200}", "a=!!int x"])
def test_set_takes_no_value_that_a_file_could_not_have(item: str) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_settings([item])


def test_set_takes_no_key_without_end() -> None:
    with pytest.raises(UsageError):
        parse_settings([f"{'a.' * 2_000}b=1"])
    assert parse_settings(["data.source=a: b: c", "train.steps=5"])["train"] == {"steps": 5}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"a": {"b": [1, ' + "9" * 5_000 + "]}}", r"^a\.b\.1: a number of 5000 digits"),
        ('{"a": 1' + "0" * 400 + "}", "^a: a number of 401 digits"),
        ('{"a": ' + "[" * 500 + "]" * 500 + "}", r"^a\.0.*nested more than 64"),
        ("[" * 100_000, "not JSON .*nested more than 64"),
        ('{"a": 1', "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
    ],
    ids=lambda text: str(text[:20]),
)
def test_no_json_gets_past_its_bounds(text: str | bytes, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        parse_json(text)
    with pytest.raises(InputError, match="here: "):
        parse_object(text, "here")


def test_what_real_files_hold_is_read() -> None:
    limit = 1000000000000000019884624838656  # in many a tokenizer_config.json: no limit
    nested: Any = 0
    for _ in range(MAX_DEPTH - 1):
        nested = [nested]
    content = {"model_max_length": limit, "time_step_limit": [0.0, float("inf")], "deep": nested}
    assert parse_json(json.dumps(content)) == content


@pytest.mark.parametrize("name", ["missing", "a" * 300, "nul\0", "folder", "pipe", "large"])
def test_what_is_no_readable_file_is_named(tmp_path: Path, name: str) -> None:
    import os

    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(InputError) as caught:
        read_file(tmp_path / name)
    assert caught.value.hint


def test_a_schema_names_the_key_and_leaves_out_what_it_does_not_know() -> None:
    from smolctl.runs.events import Prediction

    record: dict[str, Any] = {
        "step": 1,
        "prompt": "a",
        "text": "b",
        "loss": None,
        "top": [{"text": "c", "probability": 0.5}],
    }
    later = {**record, "colour": "red", "top": [{**record["top"][0], "rank": 1}]}
    assert checked(Prediction, later, "here") == checked(Prediction, record, "here")
    with pytest.raises(InputError, match=r"here: top\.0\.probability: .*got 'much'"):
        checked(Prediction, {**record, "top": [{"text": "c", "probability": "much"}]}, "here")
    with pytest.raises(InputError, match="here: prompt: Field required"):
        checked(Prediction, {"step": 1}, "here")


def test_a_yaml_that_is_none_at_all_is_told_from_one_that_is_refused() -> None:
    with pytest.raises(InputError, match="line 2"):
        parse_yaml("a: 1\nb: [", "here")


def test_a_cause_is_one_line_of_bounded_length() -> None:
    error = SmolError(f"a: {'x' * 10_000}\nb\x85c\u2028d")
    assert len(error.message.splitlines()) == 1
    assert len(str(error)) <= LONGEST + 1
