"""`smolctl bench` at work: suites that run, answers that are compared, records, gates, peers."""

from __future__ import annotations

import io
import json
import pickle
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smolctl.benchmark import measure
from smolctl.benchmark.bench import BenchOptions, bench, results_of
from smolctl.benchmark.correctness import bits_of
from smolctl.benchmark.engine_files import huggingface_folder, make_engine_files
from smolctl.benchmark.engines import EngineSpec, RandomWeights, open_engine, open_weighted
from smolctl.benchmark.file_suites import drop_from_page_cache
from smolctl.benchmark.inference_suites import decode, prefill
from smolctl.benchmark.limits import HardwareLimits
from smolctl.benchmark.metrics import metrics_of
from smolctl.benchmark.report import Result
from smolctl.benchmark.suites import PreparedWorkload, choose_suites
from smolctl.benchmark.workload import EngineFacts, Sizes, Workload, cut
from smolctl.errors import InputError, SmolError, UsageError
from smolctl.generation.engine import Cache, Engine, Logits
from smolctl.generation.torch_engine import TorchEngine
from smolctl.model.network import Transformer
from smolctl.sources import open_source
from smolctl.sources.base import ModelSource, SourceKind
from smolctl.worker import Worker, serve
from tests.support.processes import Smolctl, start
from tests.support.tiny_models import CountingEngine, tiny_network

SUITES = {
    *("load-cold", "load-warm", "prefill", "decode", "decode-batch", "tokenize"),
    *("train-step", "train-forward", "train-backward", "train-optimizer"),
    *("checkpoint-save", "checkpoint-load"),
}
RESULT_KEYS = {
    *("suite", "model", "engine", "precision", "median", "min", "max", "unit"),
    *("peak_rss_bytes", "roofline_share"),
}
LIMITS = HardwareLimits(10e9, {"float32": 100e9}, 10e9, {"float32": 100e9})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine would take minutes over models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- work, in this process ------------------------------------------------------------------------


def small_network(seed: int = 0) -> Transformer:
    """With a context of few tokens, so that its suites take no time."""
    return tiny_network(seed, context=24)


def tiny_workload(suite: str) -> Workload:
    config = small_network().config
    sizes = Sizes.fitting(config, None, batch=3)
    text = cut([(7 * at * at + 3 * at) % config.vocab_size for at in range(400)], sizes)
    return Workload(suite, EngineSpec("smolctl", "tiny", 1), sizes, text)


SUITE = {"prefill": prefill, "decode": decode, "batch": decode}


class Perturbed(Engine):
    """An engine that is quick to answer and wrong in one way."""

    def __init__(self, engine: Engine, how: str) -> None:
        super().__init__(engine.config, engine.name)
        self.engine, self.how, self.calls = engine, how, 0

    def allocate(self, sequences: int, capacity: int) -> Cache:
        return self.engine.allocate(sequences, capacity)

    def forward(self, tokens: Sequence[Sequence[int]], cache: Cache, every: bool = False) -> Logits:
        self.calls += 1
        if self.how == "forgets what it has read" and len(tokens[0]) == 1:
            cache = self.allocate(len(tokens), 1)
        logits = self.engine.forward(tokens, cache, every)
        if self.how == "mixes up sequences":
            return np.roll(logits, 1, axis=0)
        if self.how == "repeats itself":
            self.kept = getattr(self, "kept", logits)
            return self.kept if self.kept.shape == logits.shape else logits
        if self.how == "fails now and then" and self.calls == 2:
            return logits[..., ::-1].copy()
        return logits


def result_of(engine: Engine, suite: str, repeats: int = 2) -> Result:
    """A result as `bench` makes it, with the tiny network's output as the expected one."""
    workload = tiny_workload(suite)
    expected = SUITE[suite](TorchEngine(small_network()), workload)().output
    facts = EngineFacts(engine.name, "float32", 10_000)
    metrics = metrics_of(workload, engine.config, facts, 0)
    prepared = PreparedWorkload(workload, SUITE[suite](engine, workload), metrics, facts, 0)
    measurements = [prepared.run() for _ in range(repeats)]
    return results_of(prepared, measurements, {suite: expected}, LIMITS)[0]


@pytest.mark.parametrize("kind", ["prefill", "decode", "batch"])
def test_a_right_engine_is_called_right(kind: str) -> None:
    found = result_of(TorchEngine(small_network()), kind)
    assert found.right
    assert found.median > 0


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("forgets what it has read", "decode"),
        ("forgets what it has read", "batch"),
        ("mixes up sequences", "batch"),
        ("repeats itself", "decode"),
        ("fails now and then", "prefill"),  # in the second repeat only
    ],
)
def test_a_fast_wrong_engine_is_caught(how: str, kind: str) -> None:
    found = result_of(Perturbed(TorchEngine(small_network()), how), kind)
    assert not found.right
    assert found.answer_error > 0.1


@pytest.mark.parametrize("kind", ["prefill", "decode", "batch"])
def test_other_weights_are_caught(kind: str) -> None:
    assert not result_of(TorchEngine(small_network(seed=1)), kind).right


def test_decoding_reads_one_given_token_a_step_and_every_repeat_the_same() -> None:
    engine, workload = CountingEngine(TorchEngine(small_network())), tiny_workload("batch")
    run = decode(engine, workload)
    run()
    first, engine.calls = engine.calls, []
    run()
    assert engine.calls == first
    prompt, *steps = first
    assert [len(ids) for ids in prompt] == [workload.sizes.prompt] * 3
    assert len(steps) == workload.sizes.decoded
    assert all(len(ids) == 1 for step in steps for ids in step)
    assert len({tuple(ids) for ids in prompt}) == 3  # the sequences differ, or mixing them up would not show


def test_sizes_follow_the_context_and_the_recipe() -> None:
    small = tiny_network(context=8).config
    sizes = Sizes.fitting(small, None)
    assert sizes.prompt + sizes.decoded <= 8
    assert sizes.prefill == 8


@pytest.mark.parametrize("preset", ["nano", "smollm2-135m", "smollm2-135m-hub", None])
def test_a_step_has_the_tokens_of_a_real_one(preset: str | None) -> None:
    if preset is None:  # weights without a recipe
        sizes = Sizes.fitting(tiny_network(context=8_192).config, None)
        assert (sizes.sequences, sizes.length) == (4, 512)  # those of benchmarks/train_step.py
        return
    source = open_source(preset)
    assert source.run is not None
    sizes, recipe = Sizes.fitting(source.require_config(), source.run), source.run
    assert (sizes.sequences, sizes.length) == (recipe.micro_batch_size, recipe.data.sequence_length)


# --- processes ------------------------------------------------------------------------------------


def test_an_error_of_an_engine_is_an_answer_and_the_process_goes_on() -> None:
    requests, answers = io.BytesIO(), io.BytesIO()
    workload = replace(tiny_workload("decode"), engine=EngineSpec("smolctl", "no/such/file.gguf", 1))
    pickle.dump((measure.prepare, (workload,)), requests)
    pickle.dump((divmod, (7, 0)), requests)
    pickle.dump((divmod, (7, 2)), requests)
    requests.seek(0)
    serve(requests, answers)
    answers.seek(0)
    (_, error), (_, unforeseen), (result, nothing) = (pickle.load(answers) for _ in range(3))
    assert "no such file" in error
    assert unforeseen.startswith("ZeroDivisionError: ")
    assert (result, nothing) == ((3, 1), "")


def test_a_process_runs_our_modules_and_not_those_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People bench in folders with a `random.py` or a `tokenizers.py` of their own."""
    for module in ("torch", "tokenizers", "random", "smolctl"):
        (tmp_path / f"{module}.py").write_text(f"raise SystemExit('{module}.py of the working folder')")
    monkeypatch.chdir(tmp_path)
    with Worker("smolctl", 1) as worker:
        assert worker.call(bits_of, "int8") == 8


def test_a_crashed_process_is_named_and_not_waited_for() -> None:
    with Worker("llama.cpp", 1) as worker:
        worker._process.kill()
        with pytest.raises(SmolError, match=r"llama\.cpp: its process ended \(exit code -9\)"):
            worker.call(divmod, 7, 2)


@pytest.mark.parametrize(
    "shape", [{"position_embedding": "rope", "residual_scale": 1.0}, {"position_embedding": "learned"}]
)
def test_a_peer_runs_no_code_of_the_folder_that_is_measured(tmp_path: Path, shape: dict[str, Any]) -> None:
    """transformers runs what a folder brings when it is trusted: only this toolkit's files may be."""
    config = tiny_network(**shape).config
    source = ModelSource(SourceKind.CONFIG, "tiny", config, weights=RandomWeights(config))
    folder = Path(huggingface_folder(source, tmp_path / "foreign"))
    for name in ("modeling_smolctl", "configuration_smolctl"):
        (folder / f"{name}.py").write_text("raise SystemExit('code of the folder ran')")
    described = json.loads((folder / "config.json").read_text())
    described.setdefault("auto_map", {"AutoModelForCausalLM": "modeling_smolctl.SmolctlForCausalLM"})
    (folder / "config.json").write_text(json.dumps(described))
    weighted = open_weighted(str(folder))
    engines, left_out = make_engine_files(weighted, (), ("transformers",), 1, tmp_path / "work")
    assert not left_out
    engine = open_engine(engines[-1])
    assert engine.forward([[3, 5]], engine.allocate(1, 2)).shape == (1, config.vocab_size)


def test_suites_that_the_model_cannot_run_are_left_out_or_refused() -> None:
    preset = open_source("nano")
    assert choose_suites(preset, ()) == ("prefill", "decode", "batch", "train", "checkpoint")
    assert choose_suites(preset, ("train", "decode")) == ("decode", "train")
    with pytest.raises(InputError, match="nano: a preset has no weights to load"):
        choose_suites(preset, ("load",))
    with pytest.raises(UsageError, match="--suite flops does not exist"):
        choose_suites(preset, ("flops",))


def test_dropping_a_file_from_the_page_cache_leaves_its_content(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 100_000)
    drop_from_page_cache((str(path),))
    assert path.read_bytes() == b"x" * 100_000


# --- the command ----------------------------------------------------------------------------------


def test_help_names_every_option(smolctl: Smolctl) -> None:
    text = smolctl("bench", "--help").out
    options = ("suite", "to", "against", "repeats", "threads", "batch", "save", "baseline", "fail-below")
    assert all(f"--{name} " in text for name in (*options, "plot", "markdown", "json"))
    assert all(name in text for name in ("transformers", "llama.cpp", "litgpt", "tokenize", "checkpoint"))


@pytest.mark.parametrize(
    ("arguments", "code", "cause", "remedy"),
    [
        (("--suite", "flops"), 2, "--suite flops does not exist", "load, prefill, decode"),
        (("--against", "vllm"), 2, "--against vllm is not known", "transformers, llama.cpp, litgpt"),
        (("--fail-below", "0.9"), 2, "needs a baseline", "--baseline"),
        (("--baseline", "x.json", "--fail-below", "nan"), 2, "--fail-below: must be a finite", "again"),
        (("--baseline", "x.json", "--fail-below", "0"), 2, "--fail-below 0.0: must be above 0", "0.95"),
        (("--baseline", "x.json", "--fail-below", "inf"), 2, "must be a finite number, got inf", "again"),
        (("--baseline", "missing.json"), 3, "missing.json: cannot be read", "--save"),
        (("--suite", "load"), 3, "a preset has no weights to load", "Leave out"),
    ],
)
def test_what_cannot_be_meant_gets_a_cause_and_a_remedy(
    arguments: tuple[str, ...], code: int, cause: str, remedy: str, smolctl: Smolctl
) -> None:
    done = smolctl("bench", "nano", *arguments)
    assert done.code == code
    assert cause in done.err
    assert remedy in done.err
    assert len(done.err.strip().splitlines()) == 2


def test_a_peer_that_is_not_installed_is_said_before_anything_runs(
    smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolctl.benchmark.engine_files.is_installed", lambda _name: False)
    done = smolctl("bench", "nano", "--against", "llama.cpp")
    assert done.code == 1
    assert "pip install llama-cpp-python" in done.err


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob(".smolctl-bench-*"))


def rows(document: Any) -> dict[str, Any]:
    return {row["suite"]: row for row in document["results"]}


def test_every_suite_runs_on_a_run_and_the_record_is_complete(here: Path, smolctl: Smolctl) -> None:
    done = smolctl(
        "bench", "runs/learned", "--repeats", "2", "--json", "--save", "base.json", "--plot", "x.png"
    )
    assert done.code == 0, done.err
    document = done.json
    assert rows(document).keys() >= SUITES - {"load-cold"}
    if "load-cold" not in rows(document):  # not every file system forgets
        assert any("cold" in note for note in document["notes"])
    for row in document["results"]:
        assert row.keys() >= RESULT_KEYS
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert len(row["values"]) == 2
        assert row["answers_right"]
        assert row["engine"] == "smolctl"
        if sys.platform == "linux":
            assert row["peak_rss_bytes"] > 10_000_000
    assert {row["unit"] for row in document["results"]} == {"s", "tokens/s", "MB/s"}
    for suite in ("prefill", "decode", "decode-batch", "train-step", "train-forward", "load-warm"):
        assert rows(document)[suite]["roofline_share"] > 0
    machine = document["machine"]
    assert machine["limits"]["bandwidth"] > 1e8
    assert machine["limits"]["products"].keys() >= {"float32", "bfloat16"}
    assert machine["versions"].keys() >= {"python", "torch", "smolctl"}
    assert {"cpu", "gpu", "threads", "load_average", "others", "steal"} <= machine.keys()
    assert document["model"]["parameters"] == 29_216
    assert json.loads(Path("base.json").read_text()) == document
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_baseline_passes_until_it_was_faster(here: Path, smolctl: Smolctl) -> None:
    command = ("bench", "runs/llama", "--suite", "decode,checkpoint", "--repeats", "1")
    assert smolctl(*command, "--save", "base.json", "-q").code == 0
    content = json.loads(Path("base.json").read_text())
    gate = ("--baseline", "base.json", "--fail-below", "0.95")

    def with_speeds(factor: float) -> None:
        for row in content["results"]:
            row["median"] *= factor
            row["values"] = [value * factor for value in row["values"]]
        Path("base.json").write_text(json.dumps(content))

    with_speeds(1e-3)
    assert smolctl(*command, *gate).code == 0
    fewer = smolctl("bench", "runs/llama", "--suite", "decode", "--repeats", "1", *gate)
    assert fewer.code == 5
    assert "checkpoint-save smolctl" in fewer.err
    with_speeds(1e9)
    failed = smolctl(*command, *gate, "--json")
    assert failed.code == 5
    assert {change["failed"] for change in failed.json["baseline"]["changes"]} == {True}
    error = json.loads(failed.err.splitlines()[-1])["error"]
    assert error["code"] == 5
    assert "below 0.95 of the baseline: decode smolctl float32" in error["message"]
    assert smolctl(*command, "--baseline", "base.json").code == 0  # without a limit it only tells
    content["machine"]["cpu"] = "another"
    with_speeds(1.0)
    assert smolctl(*command, *gate).code == 3
    content["machine"]["cpu"], content["model"]["shape"] = json.loads(failed.out)["machine"]["cpu"], "another"
    with_speeds(1.0)
    assert smolctl(*command, *gate).code == 3


@pytest.mark.slow
def test_a_preset_runs_with_random_weights_and_prints_markdown(here: Path, smolctl: Smolctl) -> None:
    done = smolctl("bench", "nano", "--repeats", "1", "--suite", "train,batch", "--batch", "2", "--markdown")
    assert done.code == 0, done.err
    assert "| suite | engine | precision |" in done.out
    assert "| decode-batch | smolctl | float32 |" in done.out
    assert "| train-optimizer | smolctl |" in done.out


def test_variants_stand_beside_what_is_stored(here: Path) -> None:
    report = bench("runs/llama", BenchOptions(("prefill", "decode"), ("int8", "int4", "bf16"), repeats=1))
    found = {(one.suite, one.precision) for one in report.results}
    assert found == {(s, p) for s in ("prefill", "decode") for p in ("float32", "int8", "int4", "bf16")}
    assert not report.wrong
    assert {one.against_precision for one in report.comparisons} == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["runs/llama", "runs/learned"])
def test_transformers_agrees_on_the_same_work(here: Path, model: str) -> None:
    suites = ("load", "prefill", "decode", "batch", "train", "tokenize")
    report = bench(model, BenchOptions(suites, against=("transformers",), repeats=1))
    theirs = {one.suite: one for one in report.results if one.engine == "transformers"}
    assert theirs.keys() >= SUITES - {"load-cold", "checkpoint-save", "checkpoint-load"}
    assert all(one.right for one in report.results)
    for suite in ("prefill", "decode", "decode-batch"):
        error = theirs[suite].answer_error
        assert error < 1e-4
    compared = {one.suite for one in report.comparisons}
    assert compared == theirs.keys()
    assert not report.notes or all("cold" in note for note in report.notes)


@pytest.mark.slow
def test_llama_cpp_agrees_on_the_same_weights(here: Path) -> None:
    pytest.importorskip("llama_cpp")
    options = BenchOptions(("load", "prefill", "decode", "batch"), ("int8",), ("llama.cpp",), repeats=1)
    report = bench("runs/llama", options)
    theirs = [one for one in report.results if one.engine == "llama.cpp"]
    assert {one.precision for one in theirs} == {"f32", "q8_0"}
    assert all(one.right for one in theirs), [(one.suite, one.precision, one.answer_error) for one in theirs]
    pairs = {(one.precision, one.against, one.against_precision) for one in report.comparisons}
    assert pairs == {
        ("float32", "llama.cpp", "f32"),
        ("int8", "llama.cpp", "q8_0"),
        ("int8", "smolctl", "float32"),
    }


@pytest.mark.slow
def test_litgpt_agrees_on_the_same_weights(here: Path) -> None:
    pytest.importorskip("litgpt")
    report = bench("runs/llama", BenchOptions(("prefill", "decode", "batch"), (), ("litgpt",), 1))
    theirs = {one.suite: one for one in report.results if one.engine == "litgpt"}
    assert theirs.keys() >= {"prefill", "decode", "decode-batch"}
    assert all(one.right for one in theirs.values())


@pytest.mark.slow
def test_learned_positions_leave_llama_cpp_out_with_the_reason(here: Path) -> None:
    pytest.importorskip("llama_cpp")
    report = bench("runs/learned", BenchOptions(("decode",), against=("llama.cpp",), repeats=1))
    assert {one.engine for one in report.results} == {"smolctl"}
    assert any("llama.cpp is left out" in note and "learned positions" in note for note in report.notes)


def test_a_signal_ends_every_process_and_leaves_no_file(here: Path) -> None:
    process = start("bench", "runs/llama", "--suite", "checkpoint", "--repeats", "100000")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("round 2 "):
            break
    process.send_signal(signal.SIGTERM)
    assert "Traceback" not in process.communicate()[1]
    assert process.returncode == 143


@pytest.mark.slow
@pytest.mark.real_weights
def test_the_real_model_gives_every_engine_the_same_answers(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    peers = ["transformers"]
    try:
        import llama_cpp  # noqa: F401

        peers.append("llama.cpp")
    except ImportError:
        pass
    report = bench(str(gguf_file), BenchOptions(("prefill", "decode"), against=tuple(peers), repeats=1))
    assert {one.engine for one in report.results} == {"smolctl", *peers}
    assert not report.wrong, [(one.engine, one.suite, one.answer_error) for one in report.wrong]
