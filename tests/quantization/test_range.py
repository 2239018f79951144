"""Weights and activations outside float16's range: stored wider and said, measured honestly, never blamed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolctl.evaluation import Estimate, score_tokens
from smolctl.generation.engines import EngineOptions
from smolctl.generation.load import load_model
from smolctl.quantization.measure import Quality
from smolctl.quantization.quantize import QuantizeOptions, quantize
from smolctl.quantization.schemes import SchemeOptions
from smolctl.quantization.verdict import Calibration, Gates, SourceFacts, Variant, advise, judge
from smolctl.sources import open_source
from smolctl.sources.quantized.range import holds
from tests.support.processes import Called
from tests.support.tiny_models import write_folder

DOWN, KEYS, QUERIES, UP = (
    f"model.layers.0.{name}.weight"
    for name in ("mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj", "mlp.up_proj")
)
Change = Callable[[dict[str, Tensor]], None]


def set_one(value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN][3, 5] = value

    return change


def keys_times(factor: float) -> Change:
    """Keys of another size, and the same attention."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[KEYS] *= factor
        tensors[QUERIES] /= factor

    return change


def made(folder: Path, change: Change, dtype: torch.dtype = torch.float32) -> Path:
    path = write_folder(folder, intermediate_size=64) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path, {"format": "pt"})
    return folder


def quality(kl: float, bits: float = 2.0) -> Quality:
    some = Estimate(2.0, 0.1)
    return Quality(
        Estimate(bits, 0.1), some, Estimate(bits - 2.0, 0.1), Estimate(kl, 0.1), (kl, kl), 0.9, 9, 53.0, 18.6
    )


def variant(kl: float, bits: float = 2.0, scheme: str = "int4") -> Variant:
    return Variant(scheme, scheme, 200, 8.0, (), quality(kl, bits))


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "largest"),
    [("int8", 8e6), ("q8_0", 8e6), ("int4", 6e4), ("q4_1", 6e4), ("q5_1", 6e4), ("q4_0", 5e5), ("f16", 6e4)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_group_decides_whether_a_kind_holds_a_matrix(kind: str, largest: float, sign: int) -> None:
    matrix = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert holds(kind, matrix)
    matrix[3, 40] = sign * largest
    assert holds(kind, matrix)
    matrix[3, 40] = sign * largest * 40
    assert not holds(kind, matrix)


@pytest.mark.parametrize("kind", ["int8", "q8_0", "int4", "q4_1", "q5_1", "q4_0", "q5_0", "f16"])
def test_a_matrix_of_values_too_small_for_the_scales_is_not_held(kind: str) -> None:
    matrix = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    assert holds(kind, matrix * 1e-2)
    assert not holds(kind, matrix * 1e-8)
    assert holds(kind, torch.zeros(5, 50))
    matrix[2] *= 1e-8  # a small group beside larger ones costs nothing
    assert holds(kind, matrix)


@pytest.mark.parametrize(
    "change", [set_one(-1e5), set_one(3e9), keys_times(3e5)], ids=["-1e5", "3e9", "keys"]
)
@pytest.mark.parametrize("scheme", ["int8", "int4", "gguf-q8_0", "gguf-q5_1", "gguf-q4_1", "gguf-q4_0"])
def test_what_is_out_of_range_stays_wider_and_is_said(
    change: Change, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, said = made(Path("model"), change), list[str]()
    options = QuantizeOptions((scheme,), out=Path("out"), measure=False)
    written = quantize(str(model), options, said.append).variants[0]
    before, after = (
        dict(open_source(path).require_weights().tensors()) for path in (str(model), written.path)
    )
    for name, tensor in before.items():
        if tensor.dim() > 1:
            error = float((after[name].float() - tensor).abs().max())
            assert error <= 0.14 * float(tensor.abs().max()), name  # 4 bits: one step of 15, or of 8
    stored = {header.name: header.dtype for header in open_source(written.path).tensors or ()}
    wider = {name for name in (DOWN, KEYS, QUERIES) if stored[name] != stored[UP]}
    assert wider or holds(scheme.removeprefix("gguf-"), before[DOWN])
    assert {line.split()[1] for line in said if "outside the range" in line} == wider


def test_one_large_weight_costs_int4_no_prediction(tmp_path: Path, smolctl: Callable[..., Called]) -> None:
    """The float16 offset of its group would be -inf, and every prediction NaN."""
    model = made(tmp_path / "model", set_one(-1e5))
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog saw the cat. " * 40)
    called = smolctl(
        *("quantize", model, "--to", "int4,gguf-q4_1", "--out", tmp_path / "out", "--windows", "2", "--json"),
        *("--data", tmp_path / "text.txt"),
    )
    assert called.code == 0, called.err
    assert called.err.count(f"{DOWN} is stored as") == 2
    for found in called.json["variants"]:
        assert math.isfinite(found["kl_mean"])
        assert math.isfinite(found["bits_per_byte"])
        assert found["top1_agreement"] > 0


# --- keys and values ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["", "int8", "gguf-q8_0"])
def test_keys_above_float16_are_kept_in_float32(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same attention, with keys 300,000 times as large: the compiled engine gives the same text."""
    monkeypatch.chdir(tmp_path)
    logits = []
    for name, factor in (("usual", 1.0), ("large", 2.0**18)):
        model = str(made(Path(name), keys_times(factor), torch.bfloat16))
        if scheme:
            model = (
                quantize(model, QuantizeOptions((scheme,), out=Path(f"{name}-out"), measure=False))
                .variants[0]
                .path
            )
        engine = load_model(model, EngineOptions(engine="native")).engine
        logits.append(engine.forward([[5, 6, 7, 8]], engine.allocate(1, 8), every=True))
    assert np.isfinite(logits[1]).all()
    spread = float(logits[0].std())
    assert float(np.abs(logits[0] - logits[1]).max()) < (0.5 if scheme else 0.05) * spread


def test_a_dtype_that_cannot_hold_the_weights_is_refused_and_not_the_weights(
    tmp_path: Path, smolctl: Callable[..., Called]
) -> None:
    model = made(tmp_path / "model", set_one(-1e5))
    asked = ("sample", model, "--no-chat", "--prompt", "the cat", "--max-tokens", "2", "--dtype")
    called = smolctl(*asked, "float16")
    assert called.code == 2
    assert f"--dtype float16: {DOWN}" in called.err
    assert smolctl(*asked, "bfloat16").code == 0


# --- measures -------------------------------------------------------------------------------------


def test_predictions_that_are_nan_have_no_finite_score_and_agree_with_nothing() -> None:
    good, bad = torch.randn(6, 9), torch.full((6, 9), math.nan)
    for own, reference in ((bad, good), (good, bad), (bad, bad)):
        scores = score_tokens(own, torch.arange(6), reference)
        assert not scores.kl.mean().isfinite()
    assert not score_tokens(bad, torch.arange(6), bad).agrees.any()
    one_row = good.clone()
    one_row[2] = math.nan
    assert not score_tokens(one_row, torch.arange(6), good).kl.mean().isfinite()
    assert score_tokens(good, torch.arange(6), good).kl.mean() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_broken_fails_every_gate_and_wins_nothing(value: float) -> None:
    broken, poor = variant(value, value), variant(3.0, scheme="int8")
    facts = SourceFacts("source", 1_000, 32.0)
    said = judge(broken, [broken, poor], facts)
    assert said.startswith("broken")
    assert "not worth its size: int8" in said
    assert "int4" not in judge(poor, [broken, poor], facts)
    assert advise(broken, SchemeOptions(calibrate=True))
    for gates in (Gates(max_kl=1e9), Gates(max_bpb_increase=1e9)):
        (line,) = gates.broken_by([broken, variant(0.001)])
        assert "not finite" in line
    assert Calibration(plain_kl=value, searched_kl=0.1).helped
    assert not Calibration(plain_kl=0.1, searched_kl=value).helped
    assert not Calibration(plain_kl=value, searched_kl=value).helped


def test_a_source_that_predicts_nan_is_called_broken_and_not_matched() -> None:
    nothing = Estimate(math.nan, None)
    found = replace(quality(math.nan, math.nan), source_bits_per_byte=nothing)
    said = judge(replace(variant(0.0), quality=found), [], SourceFacts("source", 1_000, 32.0))
    assert said == "broken: the source itself predicts NaN or infinite values"


# --- gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--max-kl", "--max-bpb-increase"])
@pytest.mark.parametrize(
    ("value", "more", "said"),
    [
        ("0.01", ("--no-measure",), "nothing to check with --no-measure"),
        ("nan", (), "must be a finite number"),
        ("inf", (), "must be a finite number"),
    ],
)
def test_a_gate_that_could_never_fail_is_refused(
    here: Path, smolctl: Callable[..., Called], option: str, value: str, more: tuple[str, ...], said: str
) -> None:
    called = smolctl("quantize", "runs/llama", "--out", "out", option, value, *more)
    assert called.code == 2
    assert option in called.err
    assert said in called.err
    assert not Path("out").exists()
