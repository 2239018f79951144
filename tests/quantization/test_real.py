"""`quantize` on the real SmolLM2-135M-Instruct: what every scheme costs it, and what rescues int8-dynamic.

The weights were stored as Q4_1: int4 in groups of 32 finds their own grid again and loses nothing. How 4
bits compare is therefore asked of int4 in groups of 64 and of q4_0, which cannot.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from smolctl.generation.engines import EngineOptions
from smolctl.generation.load import load_model
from smolctl.quantization import measure
from smolctl.quantization.footprint import measure_footprint
from smolctl.quantization.measure import PROMPTS
from smolctl.quantization.quantize import QuantizeOptions, QuantizeReport, quantize
from smolctl.quantization.schemes import SchemeOptions
from smolctl.quantization.verdict import Variant
from smolctl.sources import open_source
from smolctl.sources.quantized_folder import FILE
from tests.support.instruction_sets import AVX2, computed_with, predictions

# One process makes the variants for all tests.
pytestmark = [pytest.mark.slow, pytest.mark.real_weights, pytest.mark.xdist_group("real variants")]

TEXT = (str(argparse.__file__), str(statistics.__file__))  # everybody has it
OUTLIER = "model.layers.11.mlp.down_proj.weight"


@dataclass(frozen=True)
class Bench:
    """Where the variants lie, and what was measured."""

    folder: Path
    gguf: Path
    reports: dict[str, QuantizeReport]

    def variant(self, report: str, scheme: str) -> Variant:
        return next(one for one in self.reports[report].variants if one.scheme == scheme)

    def kl(self, report: str, scheme: str) -> float:
        quality = self.variant(report, scheme).quality
        assert quality is not None
        return quality.kl.mean


@pytest.fixture(scope="module")
def bench(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Every scheme once, and int8-dynamic with what rescues it."""
    folder = tmp_path_factory.mktemp("real")

    def make(name: str, *schemes: str, **options: Any) -> QuantizeReport:
        asked = SchemeOptions(**options)
        return quantize(str(gguf_file), QuantizeOptions(schemes, asked, folder / name, data=TEXT, windows=2))

    ggufs = ("gguf-q8_0", "gguf-q4_1", "gguf-q4_0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLCTL_CACHE", str(folder / "cache"))
        for name, short in {"PREFILL_TOKENS": 16, "DECODED_TOKENS": 8, "TURN_SECONDS": 1e-9}.items():
            patch.setattr(measure, name, short)  # no test here asks how fast they are
        reports = {
            "all": make("all", "bf16", "int8", "int4", "int8-dynamic", *ggufs),
            "skip": make("skip", "int8-dynamic", skip=("down_proj",)),
            "token": make("token", "int8-dynamic", activations="per-token", per_row=True),
        }
    return Bench(folder, gguf_file, reports)


def test_fewer_bits_never_predict_more_like_the_source(bench: Bench) -> None:
    assert bench.kl("all", "bf16") < bench.kl("all", "int8") < 0.01
    assert bench.kl("all", "gguf-q8_0") < bench.kl("all", "gguf-q4_0")
    sizes = [bench.variant("all", scheme).bytes for scheme in ("bf16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)


def test_rounding_to_the_grid_the_weights_are_on_costs_nothing(bench: Bench) -> None:
    assert bench.kl("all", "int4") < 1e-3
    assert bench.kl("all", "gguf-q4_1") < 1e-3


def test_one_scale_for_all_activations_breaks_the_model_and_the_verdict_says_how_to_mend_it(
    bench: Bench,
) -> None:
    broken = bench.variant("all", "int8-dynamic")
    assert broken.quality is not None
    assert broken.quality.kl.mean > 0.5
    assert broken.quality.perplexity > 1.5 * broken.quality.source_perplexity
    assert broken.verdict.startswith(f"broken: perplexity {broken.quality.perplexity:.3g}")
    assert "not worth its size" in broken.verdict
    assert "--activations per-token --per-row" in broken.hint


def test_what_the_verdict_advises_rescues_int8_dynamic(bench: Bench) -> None:
    per_tensor, skipping, per_token = (
        bench.kl(report, "int8-dynamic") for report in ("all", "skip", "token")
    )
    assert per_token < skipping < per_tensor / 2  # the outliers are in 30 of 211 matrices
    assert per_token < 0.01
    assert bench.variant("token", "int8-dynamic").verdict.startswith("as good as the source")


def test_quantized_models_predict_the_same_on_a_cpu_with_fewer_instructions(bench: Bench) -> None:
    # With one scale for all activations the model is so broken that a change of 1e-7 in its norms changes its
    # predictions (KL 1.1). Float32 sums differ by as much from CPU to CPU: only its KL to the source holds.
    models = [bench.variant(*key).path for key in (("all", "int8"), ("token", "int8-dynamic"))]
    ours, theirs = predictions(models), computed_with(AVX2, models)
    for model in models:
        expected, found = (logits[model].log_softmax(-1) for logits in (ours, theirs))
        kl = (expected.exp() * (expected - found)).sum(-1).mean()
        assert kl < 1e-3, model


def test_layers_with_outliers_are_named(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolctl.quantization.quantize.COSTLIEST", 2)
    monkeypatch.setattr("smolctl.quantization.quantize.COST_WINDOWS", 2)
    options = QuantizeOptions(
        ("int8-dynamic",), SchemeOptions(), tmp_path / "out", measure=False, data=TEXT, per_tensor=True
    )
    costs = quantize(str(gguf_file), options).costs["int8-dynamic"]
    worst = costs[0]
    assert worst.name == OUTLIER
    assert worst.largest_input is not None
    assert worst.median_input is not None
    assert worst.largest_input > 10_000 * worst.median_input
    assert worst.output_error > 0.9  # what is not the outlier gets nothing
    assert worst.kl is not None
    assert all("down_proj" in cost.name for cost in costs[:5])


def test_calibration_lowers_kl_at_the_same_bytes(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolctl.quantization.texts.CALIBRATION_WINDOWS", 10)
    sizes = {}
    for calibrate in (False, True):
        asked = SchemeOptions(group=64, calibrate=calibrate)
        options = QuantizeOptions(("int4",), asked, tmp_path / str(calibrate), measure=False, data=TEXT)
        made = quantize(str(gguf_file), options).variants[0]
        sizes[calibrate] = made.bytes
    assert made.calibration is not None
    assert made.calibration.searched_kl < 0.9 * made.calibration.plain_kl
    assert "less KL than plain ones" in made.verdict
    header = [open_source(str(tmp_path / name)).tensors for name in ("False", "True")]
    assert header[0] == header[1]
    assert sizes[True] == sizes[False]


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0"])
def test_gguf_speaks_the_same_in_transformers_and_here(bench: Bench, scheme: str) -> None:
    from transformers import AutoModelForCausalLM

    path = Path(bench.variant("all", f"gguf-{scheme}").path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = load_model(str(path), EngineOptions(engine="torch"))
    prompt = ours.tokenizer.encode(PROMPTS[2])
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0].tolist()
    cache = ours.engine.allocate(1, len(prompt) + 16)
    tokens, read = list(prompt), list(prompt)
    for _ in range(16):
        read = [int(ours.engine.forward([read], cache).argmax())]
        tokens += read
    assert tokens == expected


@pytest.mark.parametrize("scheme", ["int8", "int4", "bf16"])
def test_loading_takes_little_more_memory_than_the_file(bench: Bench, scheme: str) -> None:
    folder = Path(bench.variant("all", scheme).path)
    tiny = bench.folder / "tiny"
    if not tiny.exists():
        _write_tiny(tiny, bench.gguf)
    footprint, base = (measure_footprint(str(path)) for path in (folder, tiny))
    assert footprint is not None
    assert base is not None
    if footprint.peak_bytes is None or base.peak_bytes is None:
        pytest.skip("the system does not tell")
    assert footprint.peak_bytes - base.peak_bytes < 1.25 * (folder / FILE).stat().st_size + 10e6


def _write_tiny(folder: Path, gguf: Path) -> None:
    """The same tokenizer with next to no weights: what Python, PyTorch and it take by themselves."""
    from smolctl.quantization.build import build_items
    from smolctl.quantization.folder import Origin, write_folder
    from smolctl.quantization.schemes import plan_quantization

    source = open_source(str(gguf))
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = source.require_config().model_copy(update={**small, "num_key_value_heads": 1})
    plan = plan_quantization(config, "bf16", SchemeOptions())
    tensors = {tensor.name: torch.zeros(tensor.shape) for tensor in plan.tensors}
    items = build_items(config, tensors, plan)
    write_folder(folder, config, plan, items, source.read_tokenizer(), Origin("tiny", "test"))


def test_gguf_cannot_have_k_quants_and_says_why(gguf_file: Path, tmp_path: Path) -> None:
    from smolctl.errors import InputError

    with pytest.raises(InputError, match="576 is not a multiple of 256"):
        quantize(str(gguf_file), QuantizeOptions(("gguf-q4_k_m",), out=tmp_path / "out"))


def test_description_of_a_real_folder_names_its_origin(bench: Bench) -> None:
    content = json.loads((Path(bench.variant("all", "int8").path) / "quantization.json").read_text())
    assert content["source"]["kind"] == "gguf"
    assert content["source"]["id"] == str(bench.gguf)
