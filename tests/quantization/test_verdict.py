"""What is said of a quantized model: its figures, whether it is worth it, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from smolctl.evaluation import Estimate
from smolctl.quantization.schemes import SCHEMES, SchemeOptions
from smolctl.quantization.verdict import Gates, SourceFacts, Variant, advise, judge
from smolctl.sources import open_source
from smolctl.sources.quantized_folder import FILE
from tests.support.processes import Called

KEYS = {
    *("scheme", "path", "bytes", "bits_per_weight", "bits_per_byte", "bits_per_byte_delta", "kl_mean"),
    *("top1_agreement", "decode_tokens_per_s", "speedup", "verdict"),
}


def test_json_has_every_promised_key_and_a_source_beside(here: Path, smolctl: Callable[..., Called]) -> None:
    called = smolctl(
        *("quantize", "runs/llama", "--to", "int8,int4", "--out", "q", "--windows", "4", "--json", "-q")
    )
    assert called.code == 0, called.err
    document = called.json
    assert [variant["scheme"] for variant in document["variants"]] == ["int8", "int4"]
    for variant in document["variants"]:
        assert variant.keys() >= KEYS
        assert all(variant[key] is not None for key in KEYS)
        assert Path(variant["path"]).is_dir()
    eight, four = document["variants"]
    assert four["bytes"] < eight["bytes"] < document["source"]["bytes"]
    assert 0 <= eight["kl_mean"] < four["kl_mean"]
    assert eight["peak_rss_bytes"] > 1_000_000


@pytest.mark.parametrize(
    "gate", [("--max-kl", "0"), pytest.param(("--max-bpb-increase", "-1"), marks=pytest.mark.slow)]
)
def test_gate_that_is_not_met_is_exit_5_with_the_report(
    here: Path, smolctl: Callable[..., Called], gate: tuple[str, str]
) -> None:
    command = ("quantize", "runs/llama", "--to", "int4", "--out", "q", "--windows", "2", *gate)
    called = smolctl(*command)
    assert called.code == 5
    assert "int4" in called.out
    assert "is above" in called.err
    assert open_source("q").quantization is not None  # the files stay, to be looked at


def variant(scheme: str, size: int, kl: float, speeds: tuple[float, float, float] | None = None) -> Variant:
    from smolctl.evaluation import Estimate
    from smolctl.quantization.measure import Quality, Speed
    from smolctl.timing import Spread

    some = Estimate(1.0, 0.01)
    windows = tuple(kl * 100 * (1 + number / 100) for number in range(8))
    quality = Quality(some, some, Estimate(kl, 0.001), Estimate(kl, kl / 10), windows, 0.9, 800, 53.0, 18.6)
    spread = Spread(1.0, 1.0, 1.0)
    speed = Speed(spread, spread, spread, spread, Spread.of(speeds), spread) if speeds else None
    return Variant(scheme, scheme, size, 8.0, (), quality, speed)


SOURCE = SourceFacts("source", 1_000, 32.0)


def test_verdict_says_worse_than_its_size_and_slower() -> None:
    good, bad = (
        variant("int8", 300, 0.004, (1.5, 1.6, 1.7)),
        variant("int8-dynamic", 400, 1.0, (0.5, 0.6, 0.7)),
    )
    assert judge(good, [good, bad], SOURCE) == "as good as the source; 1.60 × as fast"
    said = judge(bad, [good, bad], SOURCE)
    assert "broken: perplexity 53, the source's 18.6" in said
    assert "not worth its size: int8 is better and no larger" in said
    assert "slower" in said


def test_remedy_follows_from_what_was_asked_for() -> None:
    bad = variant("int8-dynamic", 400, 1.0)
    assert "--activations per-token" in advise(bad, SchemeOptions())
    assert advise(bad, SchemeOptions(activations="per-token", per_row=True)) == ""
    assert "--calibrate" in advise(variant("int4", 200, 0.05), SchemeOptions())
    assert "--bits-map" in advise(variant("int4", 200, 0.2), SchemeOptions(calibrate=True))
    assert advise(variant("int8", 300, 0.004), SchemeOptions()) == ""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("calibrate", [False, True])
def test_a_remedy_can_be_typed_and_changes_the_model(
    here: Path, smolctl: Callable[..., Called], scheme: str, calibrate: bool
) -> None:
    """A scheme's own remedy, put behind the command, gives another file, and none that is smaller."""
    options = SchemeOptions(calibrate=calibrate and scheme in ("int8", "int4"))
    flags = advise(variant(scheme, 200, 0.3), options).partition(":")[0].split()
    if not flags:
        assert scheme.endswith("f16") or scheme == "bf16"
        return
    command = ("quantize", "runs/llama", "--no-measure", "--json", "--to", scheme)
    before = smolctl(*command, "--out", "plain").json["variants"][0]
    better = smolctl(*command, "--out", "better", *flags)
    assert better.code == 0, better.err
    after = better.json["variants"][-1]
    files = [Path(one["path"]) for one in (before, after)]
    one, other = ((path if path.is_file() else path / FILE).read_bytes() for path in files)
    assert one != other or "--activations" in flags
    assert after["bytes"] >= before["bytes"]


def test_verdict_does_not_call_noise_a_speed() -> None:
    assert (
        judge(variant("int8", 300, 0.02, (0.9, 1.2, 1.5)), [], SOURCE)
        == "a small loss: perplexity 53, the source's 18.6; as fast as the source"
    )


def test_a_variant_that_predicts_the_text_no_worse_has_a_change_and_no_loss() -> None:
    one = variant("int4", 300, 0.041)
    assert one.quality is not None
    better = replace(one, quality=replace(one.quality, perplexity=18.1))
    assert judge(better, [], SOURCE) == "a small change: KL 0.041, perplexity 18.1, the source's 18.6"


def test_variant_larger_than_its_source_is_worse_than_its_size() -> None:
    assert "the source is no larger" in judge(variant("int8", 1_000, 0.004), [], SOURCE)


def test_gates_name_the_variant_and_the_limit() -> None:
    broken = Gates(max_kl=0.1).broken_by([variant("int8", 1, 0.01), variant("int4", 1, 0.2)])
    assert broken == ("int4: mean KL 0.2 is above 0.1",)
    assert Gates(max_kl=0.1).broken_by([variant("int4", 1, float("nan"))])


@pytest.mark.parametrize(
    ("change", "shown"),
    [(0.01234, "+0.01234"), (-4.501e-05, "-0.00004501"), (0.0, "+0"), (1.5, "+1.5"), (123_400.0, "+123400")],
)
def test_a_gate_shows_a_change_with_one_sign_and_no_exponent(change: float, shown: str) -> None:
    one = variant("int8", 1, 0.01)
    assert one.quality is not None
    changed = replace(one, quality=replace(one.quality, delta=Estimate(change, None)))
    assert Gates(max_bpb_increase=-1).broken_by([changed]) == (f"int8: bits per byte {shown} is above -1",)
