"""sampling.js chooses the tokens that sampling.py chooses, from the same seed."""

from __future__ import annotations

import base64
import json
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smolctl.escaping import json_text
from smolctl.generation.sampling import SamplingSettings, choose, generator_for, likeliest, log_normalizer
from tests.support.node import run_module

CASES = """
import {Sampler, Random, probabilities} from "./sampling.js";
import {readFileSync} from "node:fs";
const numbers = (hex) => new Float32Array(Uint8Array.from(Buffer.from(hex, "base64")).buffer);
const found = [];
for (const {logits, settings, seed, seen, draws, id} of JSON.parse(readFileSync(0))) {
  const row = numbers(logits);
  const sampler = new Sampler(settings, seed);
  await sampler.ready;
  found.push([Array.from({length: draws}, () => sampler.choose(row, seen)), probabilities(row, id, 4)]);
}
console.log(JSON.stringify(found));
"""


def shapes(size: int) -> dict[str, NDArray[np.float32]]:
    """Rows of logits, (size,) each, by what is odd about them."""
    noise = np.random.default_rng(0).normal(size=size).astype(np.float32)
    some = np.arange(size) % 3 == 0
    return {
        "usual": 4 * noise,
        "flat": noise * np.float32(0.1),
        "ties": np.round(noise),
        "all the same": np.zeros(size, np.float32),
        "forbidden tokens": np.where(some, -np.inf, noise).astype(np.float32),
        "huge": noise * np.float32(1e37),
        "one possible": np.where(np.arange(size) == 7, 1, -np.inf).astype(np.float32),
    }


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.01, "top_p": 0.3},
    {"temperature": 2.0, "min_p": 0.1, "top_k": 40, "top_p": 0.5},
]


def check(size: int, draws: int, seeds: int) -> None:
    """Compare every choice on every shape with every setting."""
    cases: list[dict[str, Any]] = []
    for number, (row, settings) in enumerate((r, s) for r in shapes(size).values() for s in SETTINGS):
        for seed in (2**63 - 1, *range(seeds)):
            seen = [1, 7, 7, size - 1, number % size]
            case = {"settings": settings, "seed": seed, "seen": seen, "draws": draws, "id": seed % size}
            cases.append({**case, "logits": row})
    encoded = [
        {**case, "seed": str(case["seed"]), "logits": base64.b64encode(case["logits"]).decode()}
        for case in cases
    ]
    found = json.loads(run_module(CASES, stdin=json_text(encoded)))
    for case, (tokens, shown) in zip(cases, found, strict=True):
        row, generator = case["logits"], generator_for(case["seed"], 0, 0)
        chosen_by = SamplingSettings(**case["settings"])
        with np.errstate(over="ignore"):
            expected = [choose(row, chosen_by, generator, case["seen"]) for _ in range(draws)]
        assert tokens == expected, case
        normalizer = log_normalizer(row)
        assert shown["probability"] == pytest.approx(np.exp(float(row[case["id"]]) - normalizer), 1e-5)
        others = [id for id in likeliest(row, len(row)).tolist() if id != case["id"]][:4]
        probabilities = [pair[1] for pair in shown["alternatives"]]
        assert probabilities == pytest.approx([np.exp(float(row[id]) - normalizer) for id in others], 1e-5)
        assert [pair[0] for pair in shown["alternatives"]] == others


def test_the_same_choices_as_in_python() -> None:
    check(size=300, draws=3, seeds=2)


@pytest.mark.slow
def test_the_same_choices_from_a_whole_vocabulary() -> None:
    check(size=49_152, draws=3, seeds=0)


def test_the_numbers_are_those_of_pythons_generator() -> None:
    texts = ["(0, 0, 0)", "", "é" * 700]  # a short seed, an empty one, one of more than 624 words
    source = """
import {Random} from "./sampling.js";
for (const text of JSON.parse(process.argv[2])) {
  const random = await Random.of(text);
  console.log(Array.from({length: 700}, () => random.next()).join(" "));
}
"""
    lines = run_module(source, json_text(texts)).splitlines()
    for text, line in zip(texts, lines, strict=True):
        generator = Random(text)
        assert [float(number) for number in line.split()] == [generator.random() for _ in range(700)]


def test_logits_that_are_not_finite_are_refused() -> None:
    source = """
import {Sampler, probabilities} from "./sampling.js";
const sampler = new Sampler({temperature: 0.7}, 0);
await sampler.ready;
const rows = [[0, NaN, 1], [NaN, 1, 2], [1, Infinity], [-Infinity, -Infinity]];
for (const row of rows.map((row) => Float32Array.from(row)))
  for (const use of [() => sampler.choose(row, []), () => probabilities(row, 0, 2)])
    try {
      use();
      console.log("taken");
    } catch (error) {
      console.log(error.message);
    }
"""
    assert set(run_module(source).splitlines()) == {"the model's output is not finite"}
