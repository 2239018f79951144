"""engine.js and the compiled engine give the native engine's tokens, of the bytes that `quantize` wrote."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smolctl.errors import InputError
from smolctl.escaping import json_text
from smolctl.generation.load import load_model
from smolctl.generation.native_engine import NativeEngine
from smolctl.native.build import HERE
from smolctl.page.layout import engine_layout
from smolctl.sources.open import open_source
from smolctl.sources.quantized_folder import FILE
from tests.support.native import library
from tests.support.node import run_module
from tests.support.processes import Smolctl
from tests.support.quantized_folders import SHAPES, quantized_folder

# Reads jobs, one a line, and prints for each what the engine gave.
JOBS = """
import {createEngine, memoryNeeded} from "./engine.js";
import {readFileSync} from "node:fs";
import {Worker} from "node:worker_threads";
const code = new URL("file://" + process.argv[2]);
const likeliest = (logits) => logits.indexOf(Math.max(...logits));
for (const job of JSON.parse(readFileSync(0))) {
  const bytes = readFileSync(job.file);
  const weights = {bytes: bytes.length, layout: job.layout};
  const name = job.threads > 1 ? "engine-threads.wasm" : "engine.wasm";
  const module = new WebAssembly.Module(readFileSync(new URL(name, code)));
  const helpers = [];
  const startThread = (...given) => {
    if (job.helpers === 0) return; // they never come
    const names = [new URL("../page/files/engine.js", code), "node:worker_threads"];
    const run = `Promise.all(${JSON.stringify(names)}.map((name) => import(name))).then(
      ([{runThread}, {workerData}]) => runThread(...workerData))`;
    helpers.push(new Worker(run, {eval: true, workerData: given}));
  };
  const engine = await createEngine({...job, module, weights, startThread});
  for (let at = 0; at < bytes.length; at += 5000) engine.write(at, bytes.subarray(at, at + 5000));
  await engine.start();
  if (engine.threads !== (job.helpers ?? job.threads - 1) + 1) throw new Error(`${engine.threads} threads`);
  const found = {memory: engine.memoryBytes, needed: memoryNeeded(weights, job.positions, job.threads)};
  found.runs = [];
  for (const {keep, parts, greedy} of job.runs) {
    engine.truncate(keep);
    let logits;
    for (const part of parts)
      logits = job.whole ? await engine.read(part, async () => true) : engine.forward(part);
    const first = Array.from(logits);
    const tokens = [];
    while (tokens.length < greedy) {
      tokens.push(likeliest(logits));
      logits = engine.forward(tokens.slice(-1));
    }
    found.runs.push({first, tokens, length: engine.length});
  }
  console.log(JSON.stringify(found));
  for (const helper of helpers) helper.terminate();
}
"""


def ids(count: int, seed: int = 0, size: int = 131) -> list[int]:
    return np.random.default_rng(seed).integers(0, size, count).tolist()


def split(tokens: list[int], *sizes: int) -> list[list[int]]:
    """Parts of these sizes in turn, and again from the first one."""
    parts: list[list[int]] = []
    at = 0
    while at < len(tokens):
        parts.append(tokens[at : at + sizes[len(parts) % len(sizes)]])
        at += len(parts[-1])
    return parts


def job(folder: Path, runs: list[dict[str, Any]], threads: int = 1, **more: Any) -> dict[str, Any]:
    filled = [{"keep": 0, "greedy": 0, **run} for run in runs]
    given = {"file": str(folder / FILE), "layout": engine_layout(folder), "runs": filled, "threads": threads}
    return {**given, "positions": 1500, **more}


def in_node(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run_module(JOBS, f"{HERE}/", stdin=json_text(jobs)).splitlines()]


def native(folder: Path, build: str = "baseline") -> NativeEngine:
    source = open_source(str(folder))
    weights = dict(source.require_weights().stored())
    return NativeEngine(library(build), source.require_config(), weights, threads=1)  # type: ignore[arg-type]


def expected(engine: NativeEngine, parts: list[list[int]], greedy: int) -> tuple[NDArray[Any], list[int]]:
    """Logits after the parts, and the likeliest tokens that follow."""
    cache = engine.allocate(1, sum(map(len, parts)) + greedy)
    for part in parts:
        logits = engine.forward([part], cache)
    first, tokens = logits[0], []
    for _ in range(greedy):
        tokens.append(int(logits[0].argmax()))
        logits = engine.forward([tokens[-1:]], cache)
    return first, tokens


def check(folder: Path, found: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    engine = native(folder)
    for run, result in zip(runs, found["runs"], strict=True):
        logits, tokens = expected(engine, run["parts"], run["greedy"])
        np.testing.assert_allclose(np.array(result["first"]), logits, rtol=1e-4, atol=1e-4)
        if platform.machine() == "x86_64":  # the same operations in the same order
            assert np.array_equal(np.array(result["first"], np.float32), logits)
        assert result["tokens"] == tokens


KINDS = [(shape, scheme) for shape in SHAPES for scheme in ("int8", "int4")]


def check_kinds(folder: Path, kinds: list[tuple[str, str]], greedy: int) -> None:
    runs = [
        {"parts": split(ids(40), 8), "greedy": greedy},
        {"parts": split(ids(11, 1), 1, 4, 5), "greedy": 3},
    ]
    folders = [quantized_folder(folder / scheme / shape, scheme) for shape, scheme in kinds]
    for path, found in zip(folders, in_node([job(path, runs) for path in folders]), strict=True):
        check(path, found, runs)


def test_tokens_are_the_native_engines(tmp_path: Path) -> None:
    check_kinds(tmp_path, [("learned", "int8"), ("rope", "int4")], greedy=5)


@pytest.mark.slow
def test_tokens_are_the_native_engines_for_every_kind_of_model(tmp_path: Path) -> None:
    check_kinds(tmp_path, KINDS, greedy=64)


def test_values_too_large_for_float16_are_kept_in_float32(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path / "rope", "int8", factor=1e4, group=64)
    runs = [{"parts": [ids(20)], "greedy": 5}]
    given = job(folder, runs)
    assert not given["layout"]["half_precision"]
    (found,) = in_node([given])
    check(folder, found, runs)


@pytest.mark.slow
def test_long_texts_and_threads(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path / "rope", "int4")
    runs = [{"parts": split(ids(1400), 64, 1, 7, 33, 2), "greedy": 100}]
    whole = [{"parts": [ids(1400)], "greedy": 100}]
    jobs = [
        job(folder, runs),
        job(folder, whole, whole=True),
        job(folder, runs, threads=2),
        job(folder, runs, threads=3, helpers=0),
    ]
    alone, *others = in_node(jobs)
    check(folder, alone, runs)
    for found in others:
        np.testing.assert_allclose(found["runs"][0]["first"], alone["runs"][0]["first"], rtol=1e-3, atol=1e-3)
        assert found["runs"][0]["tokens"] == alone["runs"][0]["tokens"]


def test_a_text_that_was_cut_goes_on_as_if_read_so(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path / "learned", "int8")
    text, other = ids(30), ids(6, 1)
    (found,) = in_node(
        [
            job(
                folder,
                [
                    {"parts": [text], "greedy": 10},
                    {"keep": 18, "parts": [other]},
                    {"keep": 99, "parts": [[5]]},
                    {"parts": [text[:18], other, [5]]},
                ],
            )
        ]
    )
    _, _, went_on, fresh = found["runs"]
    assert went_on["length"] == fresh["length"] == 25
    np.testing.assert_allclose(went_on["first"], fresh["first"], rtol=1e-4, atol=1e-4)


def test_a_prompt_can_be_ended_between_layers(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path / "rope", "int8")
    source = """
import {createEngine} from "./engine.js";
import {readFileSync} from "node:fs";
const job = JSON.parse(readFileSync(0));
const bytes = readFileSync(job.file);
const module = new WebAssembly.Module(readFileSync(process.argv[2]));
const engine = await createEngine({module, weights: {...job, bytes: bytes.length}, positions: 500});
engine.write(0, bytes);
await engine.start();
const [{parts: [prompt]}] = job.runs;
const read = async (most) => {
  const seen = [];
  const logits = await engine.read(prompt.slice(engine.length), async (done) => seen.push(done) <= most);
  console.log(engine.length, logits && Array.from(logits).join());
};
await read(1); // one of two layers
await read(2);
await read(1e9);
engine.truncate(0);
await read(1e9);
"""
    given = job(folder, [{"parts": [ids(200)]}])
    found = run_module(source, f"{HERE}/engine.wasm", stdin=json_text(given))
    lines = [line.split() for line in found.splitlines()]
    assert [line[0] for line in lines] in [["0", some, "200", "200"] for some in ("64", "128")]
    assert lines[0][1] == lines[1][1] == "null"
    ended, whole = (np.array(line[1].split(","), float) for line in lines[2:])
    np.testing.assert_allclose(ended, whole, rtol=1e-4, atol=1e-4)


def test_memory_is_what_was_announced_and_little_beside_weights_and_cache(tmp_path: Path) -> None:
    folders = [quantized_folder(tmp_path / shape, "int8") for shape in ("learned", "rope")]
    jobs = [job(folder, [{"parts": split(ids(1500), 64)}]) for folder in folders]  # to the last position
    for folder, found in zip(folders, in_node(jobs), strict=True):
        config = open_source(str(folder)).require_config()
        heads = config.num_hidden_layers * config.num_key_value_heads * (config.head_dim + 16)
        most = (folder / FILE).stat().st_size + 2 * 2 * 1504 * heads + (2 << 20)
        assert found["memory"] == found["needed"] < most


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    source = """
import {createEngine} from "./engine.js";
import {readFileSync} from "node:fs";
const job = JSON.parse(readFileSync(0));
const module = new WebAssembly.Module(readFileSync(process.argv[2]));
const weights = {bytes: 100_000, layout: job.layout};
const given = {module, weights, positions: 16};
const engine = await createEngine(given);
await engine.start();
const attempts = [
  () => engine.forward([1, 131]),
  () => engine.forward([]),
  () => engine.forward(new Array(17).fill(1)),
  () => engine.write(99_999, new Uint8Array(2)),
  () => createEngine({...given, positions: 1501}),
  () => createEngine({...given, weights: {...weights, bytes: 2 ** 32}}),
];
for (const attempt of attempts)
  try {
    await attempt();
    console.log("done");
  } catch (error) {
    console.log(error.name, error.message);
  }
console.log(engine.length);
"""
    given = job(quantized_folder(tmp_path / "rope", "int8"), [])
    assert run_module(source, f"{HERE}/engine.wasm", stdin=json_text(given)).splitlines() == [
        "RangeError a token is outside the vocabulary",
        "RangeError 0 tokens in a call",
        "RangeError the context is full",
        "RangeError more bytes than the model has",
        "RangeError more positions than the model has",
        "RangeError a page's memory is below 4 GiB",
        "0",
    ]


@pytest.mark.parametrize(
    ("scheme", "options", "words"),
    [
        ("int8-dynamic", {}, "int8-dynamic"),
        ("int4", {"skip": ("down_proj",)}, "down_proj.weight is not quantized and has rows of 70"),
    ],
)
def test_what_a_browser_cannot_run_is_refused(
    tmp_path: Path, scheme: str, options: dict[str, Any], words: str
) -> None:
    folder = quantized_folder(tmp_path / "rope", scheme, **options)
    with pytest.raises(InputError, match=words):
        engine_layout(folder)


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 4,",
    "Water boils at",
    "La recette de la ratatouille commence par",
    "Dear Sir or Madam,\n\nI am writing to",
    "The mitochondria",
    "🙂 means happy, 😢 means",
    "In 1969, " + "the moon was visited by men who " * 20,
]


def check_real(folder: Path, prompts: list[str], threads: int) -> None:
    encode = load_model(str(folder)).tokenizer.encode
    runs: list[dict[str, Any]] = [{"parts": [encode(prompt)], "greedy": 64} for prompt in prompts]
    (found,) = in_node([job(folder, runs, threads, whole=True, positions=2048)])
    engine = native(folder)
    cache = 2 * 30 * 3 * 64 * 2048 * 2
    assert found["memory"] <= (folder / FILE).stat().st_size + cache + (32 << 20)
    for run, result in zip(runs, found["runs"], strict=True):
        assert result["tokens"] == expected(engine, run["parts"], 64)[1]


@pytest.mark.slow
@pytest.mark.real_weights
def test_tokens_of_the_real_model(gguf_file: Path, tmp_path: Path, smolctl: Smolctl) -> None:
    smolctl("quantize", gguf_file, "--to", "int4", "--no-measure", "--out", tmp_path / "model")
    check_real(tmp_path / "model", PROMPTS[:2], threads=1)


@pytest.mark.proof
@pytest.mark.real_weights
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_many_tokens_of_the_real_model(
    gguf_file: Path, tmp_path: Path, smolctl: Smolctl, scheme: str, threads: int
) -> None:
    smolctl("quantize", gguf_file, "--to", scheme, "--no-measure", "--out", tmp_path / "model")
    check_real(tmp_path / "model", PROMPTS, threads)
