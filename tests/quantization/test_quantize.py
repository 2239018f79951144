"""`smolctl quantize`: folders that load everywhere, verdicts, gates, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smolctl.errors import InputError, SmolError, UsageError
from smolctl.generation.load import load_model
from smolctl.generation.torch_engine import TorchEngine
from smolctl.quantization.build import build_items, dequantized, read_tensors
from smolctl.quantization.footprint import measure_footprint
from smolctl.quantization.quantize import QuantizeOptions, QuantizeReport, quantize
from smolctl.quantization.schemes import GGUF_SCHEMES, SCHEMES, SchemeOptions, make_plan
from smolctl.quantization.verdict import Gates, SourceFacts, Variant, advise, judge
from smolctl.sources import open_source
from smolctl.sources.base import ModelSource, SourceKind
from smolctl.sources.quantized.folder import DESCRIPTION, FILE
from smolctl.sources.quantized.packed import PackedMatrix
from tests.support.disks import small_disk
from tests.support.processes import ADDRESS, Called, call

TABLE = "model.embed_tokens.weight"


def make(model: str = "runs/llama", scheme: str = "int8", out: str = "out", **options: Any) -> QuantizeReport:
    asked = SchemeOptions(**options)
    return quantize(model, QuantizeOptions((scheme,), asked, Path(out), measure=False))


def weights_of(source: ModelSource) -> dict[str, torch.Tensor]:
    assert source.weights is not None
    return dict(source.weights.tensors())


def test_what_loading_costs_is_measured_without_the_modules_of_the_working_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People quantize in folders with a `random.py` or a `tokenizers.py` of their own."""
    for module in ("torch", "tokenizers", "random", "smolctl"):
        (here / f"{module}.py").write_text(f"raise SystemExit('{module}.py of the working folder')")
    monkeypatch.delenv(ADDRESS, raising=False)  # a forked process has its imports done
    assert measure_footprint("runs/llama") is not None


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["runs/llama", "runs/learned"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "bf16", "int8-dynamic"])
def test_folder_holds_exactly_what_was_computed(here: Path, model: str, scheme: str) -> None:
    make(model, scheme)
    source, written = open_source(model), open_source("out")
    plan = make_plan(source.require_config(), scheme, SchemeOptions())
    expected = dequantized(build_items(source.require_config(), read_tensors(source), plan))
    found = {name: tensor.float() for name, tensor in weights_of(written).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert written.config == source.config
    assert (written.read_tokenizer() or source).__class__.__name__ == "TokenizerFiles"


@pytest.mark.parametrize("scheme", ["int8", "int4", "bf16", "int8-dynamic"])
def test_every_command_but_training_takes_the_folder(
    here: Path, smolctl: Callable[..., Called], scheme: str
) -> None:
    make("runs/learned", scheme)
    counted = smolctl("count-params", "out", "--json").json
    assert counted["unique"] == smolctl("count-params", "runs/learned", "--json").json["unique"]
    assert smolctl("inspect-config", "out", "--json").json["checkpoint"]["matches"] is True
    answer = smolctl("sample", "out", "--prompt", "the cat", "--max-tokens", "4", "--json")
    assert answer.code == 0
    assert len(answer.json["completions"][0]["tokens"]) == 4
    refused = smolctl("train", "--init-from", "out", "--steps", "1", "--data", "corpus", "--dry-run")
    assert refused.code == 3
    assert f"quantized ({scheme})" in refused.err
    assert "--init-from runs/learned" in refused.err


def test_stored_matrices_come_packed_and_not_copied(here: Path) -> None:
    make(scheme="int4")
    stored = dict(open_source("out").require_weights().stored())
    matrices = {name: item for name, item in stored.items() if isinstance(item, PackedMatrix)}
    assert matrices[TABLE].bits == 8
    assert {item.bits for name, item in matrices.items() if name != TABLE} == {4}
    assert open_source("out").kind is SourceKind.QUANTIZED
    assert all(isinstance(stored[name], np.ndarray) for name in stored if "norm" in name)


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic"])
def test_tied_table_is_stored_once(here: Path, scheme: str) -> None:
    make(scheme=scheme)
    description = json.loads((Path("out") / DESCRIPTION).read_text())
    assert "lm_head.weight" not in description["tensors"]
    assert description["tensors"][TABLE]["bits"] == 8
    source = open_source("out")
    table = next(tensor for tensor in source.tensors or () if tensor.name == TABLE)
    assert table.bytes < 1.2 * table.parameters
    if scheme == "int8-dynamic":
        state = torch.load("out/llama_quantized.ckpt", weights_only=True)["state_dict"]
        assert [key for key in state if "embed_tokens" in key] == []


def test_mixed_plan_is_followed(here: Path) -> None:
    make(
        scheme="int4",
        skip=("layers.0.self_attn",),
        bits_map=(("re:.*down_proj", 8), ("o_proj", 16)),
    )
    entries = json.loads((Path("out") / DESCRIPTION).read_text())["tensors"]
    kinds = {name.removesuffix(".weight"): entry["stored"] for name, entry in entries.items()}
    assert kinds["model.layers.1.mlp.down_proj"] == "int8"
    assert kinds["model.layers.1.mlp.up_proj"] == "int4"
    assert kinds["model.layers.1.self_attn.o_proj"] == "bfloat16"
    assert kinds["model.layers.0.self_attn.q_proj"] == "float32"
    source, written = weights_of(open_source("runs/llama")), weights_of(open_source("out"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(source[name], written[name])


def test_larger_groups_make_smaller_files(here: Path) -> None:
    sizes = [make(scheme="int8", out=f"g{group}", group=group).variants[0].bytes for group in (32, 64)]
    assert sizes[1] < sizes[0]
    load_model("g64")


def test_bf16_of_a_llama_loads_in_transformers(here: Path) -> None:
    from transformers import AutoModelForCausalLM

    make(scheme="bf16")
    theirs = AutoModelForCausalLM.from_pretrained("out")
    ours = weights_of(open_source("out"))
    assert torch.equal(theirs.model.layers[1].mlp.up_proj.weight, ours["model.layers.1.mlp.up_proj.weight"])
    assert theirs.dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", GGUF_SCHEMES)
def test_gguf_file_is_a_model(here: Path, scheme: str) -> None:
    report = make(scheme=scheme, out="files")
    path = f"files/llama-{scheme.removeprefix('gguf-')}.gguf"
    assert report.variants[0].path == path
    assert load_model(path).engine.config.hidden_size == 32


@pytest.mark.parametrize(("scheme", "dtype"), [("gguf-f16", torch.float16), ("gguf-bf16", torch.bfloat16)])
def test_sixteen_bits_in_a_gguf_are_the_weights_rounded_once(
    here: Path, smolctl: Callable[..., Called], scheme: str, dtype: torch.dtype
) -> None:
    options = ("--to", scheme, "--out", "files", "--windows", "2", "--json")
    called = smolctl("quantize", "runs/llama", *options)
    assert called.code == 0, called.err
    (found,) = called.json["variants"]
    assert found["bits_per_weight"] < 17
    assert found["verdict"].startswith("as good as the source")
    before, after = (weights_of(open_source(model)) for model in ("runs/llama", found["path"]))
    for name, tensor in before.items():
        assert torch.equal(
            after[name].float(), tensor.to(dtype if tensor.dim() > 1 else tensor.dtype).float()
        )


# --- the brief's dynamic quantization ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"activations": "per-token", "per_row": True, "skip": ("down_proj",)}]
)
def test_dynamic_checkpoint_loads_as_plain_data_and_equals_the_folder(
    here: Path, options: dict[str, Any]
) -> None:
    make("runs/learned", "int8-dynamic", **options)
    content = torch.load("out/learned_quantized.ckpt", weights_only=True)
    assert {"state_dict", "config", "quantization"} <= content.keys()
    prompt = [[1, 2, 3, 4, 5]]
    logits = []
    for model in ("out", "out/learned_quantized.ckpt"):
        engine = load_model(model).engine
        logits.append(engine.forward(prompt, engine.allocate(1, 8), every=True))
    assert np.array_equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("runs/llama", "runs/llama/quantized/int8-dynamic/llama_quantized.ckpt"),
        ("smollm2_135m.ckpt", "smollm2_135m-int8-dynamic/smollm2_135m_quantized.ckpt"),
    ],
)
def test_dynamic_checkpoint_lies_where_the_command_says(
    here: Path, smolctl: Callable[..., Called], model: str, expected: str
) -> None:
    shutil.copy("runs/llama/checkpoints/final.ckpt", "smollm2_135m.ckpt")
    called = smolctl("quantize", model, "--to", "int8-dynamic", "--no-measure", "--force", "--json")
    assert called.code == 0, called.err
    assert called.json["variants"][0]["checkpoint"] == expected
    assert f"written: {expected}" in called.err
    torch.load(expected, weights_only=True)
    assert smolctl("sample", expected, "--prompt", "the cat", "--max-tokens", "3").code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("inspect-config", "alone.ckpt"),
        ("count-params", "alone.ckpt"),
        ("sample", "alone.ckpt", "runs/llama", "--prompt", "the cat", "--max-tokens", "3"),
        ("quantize", "alone.ckpt", "--to", "int8", "--out", "again", "--windows", "2"),
        ("push", "alone.ckpt", "--local-dir", "page"),
        ("bench", "alone.ckpt", "--suite", "decode", "--repeats", "1"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_but_training_takes_a_dynamic_checkpoint_alone(
    here: Path, smolctl: Callable[..., Called], command: tuple[str, ...]
) -> None:
    make("runs/llama", "int8-dynamic")
    shutil.move("out/llama_quantized.ckpt", "alone.ckpt")
    shutil.rmtree("out")
    called = smolctl(*command)
    assert called.code == 0, called.err


def test_dynamic_checkpoint_takes_nothing_of_its_source_along(here: Path) -> None:
    """Norms of a GGUF are views of the mapped file, and torch.save keeps all that a view looks at."""
    make("runs/llama", "gguf-q8_0", "files")
    make("files/llama-q8_0.gguf", "int8-dynamic", "out")
    state = torch.load("out/llama_quantized.ckpt", weights_only=True)["state_dict"]
    plain = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert plain
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in plain)


def test_names_are_the_models_and_not_those_of_its_old_format(here: Path) -> None:
    make("runs/llama", "gguf-q8_0", "files")
    Path("files/llama-q8_0.gguf").rename("files/llama.Q8_0.gguf")
    report = make("files/llama.Q8_0.gguf", "gguf-q4_0", "files")
    assert report.variants[0].path == "files/llama-q4_0.gguf"


def test_plan_of_a_gguf_names_its_blocks(here: Path) -> None:
    plan = " ".join(make("runs/llama", "gguf-q4_0", "files").variants[0].plan)
    assert "q8_0" in plan
    assert "q4_0" in plan
    assert "int4" not in plan


def test_dynamic_scheme_is_what_quantize_dynamic_makes(here: Path) -> None:
    """The stock call on the network of the source gives the same layers, and the layers the same output."""
    from torch import nn
    from torch.ao.quantization import quantize_dynamic

    from smolctl.model.dynamic import silence
    from smolctl.model.weights import load_network

    make("runs/llama", "int8-dynamic")
    with silence():
        stock = quantize_dynamic(load_network(open_source("runs/llama")), {nn.Linear}, dtype=torch.qint8)
    engine = load_model("out").engine
    assert isinstance(engine, TorchEngine)
    # Only the tied head differs: ours is quantized, the stock call keeps the table in float32.
    hidden = torch.randn(1, 4, 32)
    theirs, ours = (network.model.layers[0] for network in (stock, engine.network))
    assert torch.equal(theirs(hidden, None, None), ours(hidden, None, None))


def test_foreign_pickles_are_not_taken_for_a_quantized_checkpoint(here: Path) -> None:
    torch.save({"quantization": {"scheme": "int8-dynamic"}, "state_dict": {}}, "odd.ckpt")
    with pytest.raises(InputError, match=r"odd\.ckpt: has no config"):
        open_source("odd.ckpt")


# --- damage ---------------------------------------------------------------------------------------


def damage(change: Callable[[bytes], bytes], file: str = FILE) -> None:
    path = Path("out") / file
    path.write_bytes(change(path.read_bytes()))


def flipped(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic"])
@pytest.mark.parametrize(
    ("change", "file", "said"),
    [
        (lambda data: data[:-64], FILE, "truncated|were written"),
        (lambda data: data[:40], FILE, "truncated"),
        (lambda data: b"", FILE, "header|truncated"),
        (flipped, FILE, "bytes are not the ones that were written"),
        (lambda data: data.replace(b'"I8"', b'"U8"', 1), FILE, "header has changed|checksum"),
        (lambda data: data[:50], DESCRIPTION, "not JSON"),
        (lambda data: b"{}", DESCRIPTION, "not a description"),
        (lambda data: data.replace(b'"version": 1', b'"version": 9'), DESCRIPTION, "format version 9"),
        (lambda data: data.replace(b"q_proj", b"r_proj", 1), DESCRIPTION, "has no model.layers.0"),
        (lambda data: data.replace(b'"rms_norm_eps"', b'"rms_norm_epsi"'), "config.json", "checksum"),
    ],
)
def test_damage_is_one_line(
    here: Path,
    smolctl: Callable[..., Called],
    scheme: str,
    change: Callable[[bytes], bytes],
    file: str,
    said: str,
) -> None:
    make(scheme=scheme)
    damage(change, file)
    called = smolctl("sample", "out", "--prompt", "the cat", "--max-tokens", "2")
    assert called.code == 3
    assert len(called.err.splitlines()) == 2
    assert "unexpected" not in called.err
    assert re.search(said, called.err), called.err


def test_weights_of_another_model_are_refused(here: Path) -> None:
    make("runs/llama", "int8", "out")
    make("runs/llama", "int4", "other")
    Path("out", FILE).write_bytes(Path("other", FILE).read_bytes())
    with pytest.raises(InputError, match=r"has no model\.|does not list|were written"):
        open_source("out")


def test_missing_weights_are_named(here: Path) -> None:
    make()
    Path("out", FILE).unlink()
    with pytest.raises(InputError, match="missing"):
        open_source("out")


# --- the disk -------------------------------------------------------------------------------------


def test_nothing_is_overwritten_without_force(here: Path) -> None:
    make()
    with pytest.raises(UsageError, match="not empty"):
        make(scheme="int4")
    assert open_source("out").quantization["scheme"] == "int8"  # type: ignore[index]
    quantize("runs/llama", QuantizeOptions(("int4",), out=Path("out"), force=True, measure=False))
    assert open_source("out").quantization["scheme"] == "int4"  # type: ignore[index]
    assert sorted(path.name for path in here.iterdir() if path.name.startswith(".")) == []


def test_force_does_not_delete_other_peoples_files(here: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("five years of work")
    with pytest.raises(UsageError, match="not replaced"):
        quantize("runs/llama", QuantizeOptions(("int4",), out=Path("out"), force=True, measure=False))
    assert Path("out/thesis.txt").exists()


@pytest.fixture
def small(here: Path) -> Iterator[Path]:
    with small_disk(here / "small", "24k") as folder:
        yield folder


@pytest.mark.parametrize(
    ("scheme", "said"), [("int8", "the quantized model needs"), ("gguf-q8_0", "the GGUF needs")]
)
def test_full_disk_is_seen_before_anything_is_written(small: Path, scheme: str, said: str) -> None:
    with pytest.raises(SmolError, match=said):
        make(scheme=scheme, out=str(small / "out"))
    assert [path for path in small.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "gguf-q8_0"])
def test_write_that_fails_half_way_leaves_nothing(here: Path, scheme: str) -> None:
    command = ("quantize", "runs/llama", "--to", scheme, "--out", "out", "--no-measure")
    done = call(20_000, *command, module="tests.support.small_files")
    assert done.code == 1, done.err
    assert "cannot be written" in done.err
    assert "None" not in done.err
    assert "unexpected" not in done.err
    assert [path for path in here.rglob("out/*") if path.is_file()] == []
    assert [path.name for path in here.rglob("*partial*")] == []


@pytest.mark.parametrize("scheme", ["int8", "gguf-q8_0"])
def test_rename_that_fails_loses_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, smolctl: Callable[..., Called], scheme: str
) -> None:
    """The old result stands as before, and nothing lies beside it."""
    report = make(scheme=scheme, out="out")
    target = Path(report.variants[0].path)
    before = sorted((path.name, path.read_bytes()) for path in Path("out").iterdir())

    def refused(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def called(self: Path, to: Path) -> Path:
            if self.name.endswith(".partial"):
                raise PermissionError(13, "Permission denied")
            return move(self, to)

        return called

    monkeypatch.setattr(Path, "rename", refused(Path.rename))
    monkeypatch.setattr(Path, "replace", refused(Path.replace))
    called = smolctl(
        "quantize", "runs/learned" if scheme == "int8" else "runs/llama", "--to", scheme, "--out", "out",
        "--force", "--no-measure",
    )  # fmt: skip
    assert called.code == 1
    assert f"{target}: cannot be written (Permission denied)" in called.err
    assert sorted((path.name, path.read_bytes()) for path in Path("out").iterdir()) == before
    assert sorted(path.name for path in here.iterdir() if path.name.startswith(".")) == []


# --- verdicts -------------------------------------------------------------------------------------

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


def test_default_is_the_newest_run_in_int8_beside_it(here: Path, smolctl: Callable[..., Called]) -> None:
    called = smolctl("quantize", "--no-measure")
    assert called.code == 0, called.err
    assert "runs/llama/quantized/int8" in called.err
    assert "not measured" in called.out
    assert smolctl("quantize", "runs/llama", "--no-measure").code == 2
    assert smolctl("quantize", "runs/llama", "--no-measure", "--force").code == 0


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


def test_calibrated_scales_are_kept_only_where_they_help(here: Path) -> None:
    lines: list[str] = []
    options = QuantizeOptions(
        ("int4",), SchemeOptions(calibrate=True), Path("out"), measure=False, per_tensor=True
    )
    report = quantize("runs/learned", options, lines.append)
    calibration = report.variants[0].calibration
    assert calibration is not None
    said = next(line for line in lines if "searched scales" in line)
    assert ("did not help" in said) is not calibration.helped
    costs = report.costs["int4"]
    assert costs[0].output_error >= costs[-1].output_error
    assert costs[0].kl is not None


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


def test_costs_of_int8_dynamic_are_those_of_its_activations(here: Path) -> None:
    options = QuantizeOptions(
        ("int8-dynamic", "bf16"), SchemeOptions(), Path("out"), measure=False, per_tensor=True
    )
    report = quantize("runs/llama", options)
    assert report.costs.keys() == {"int8-dynamic"}  # bf16 rounds nothing to integers
    costs = report.costs["int8-dynamic"]
    assert {cost.name for cost in costs} >= {TABLE, "model.layers.0.mlp.down_proj.weight"}
    assert all(cost.largest_input and cost.median_input for cost in costs)
    assert costs[0].output_error >= costs[-1].output_error > 0


def test_verdict_does_not_call_noise_a_speed() -> None:
    assert (
        judge(variant("int8", 300, 0.02, (0.9, 1.2, 1.5)), [], SOURCE)
        == "a small loss: perplexity 53, the source's 18.6; as fast as the source"
    )


def test_variant_larger_than_its_source_is_worse_than_its_size() -> None:
    assert "the source is no larger" in judge(variant("int8", 1_000, 0.004), [], SOURCE)


def test_gates_name_the_variant_and_the_limit() -> None:
    broken = Gates(max_kl=0.1).broken_by([variant("int8", 1, 0.01), variant("int4", 1, 0.2)])
    assert broken == ("int4: mean KL 0.2 is above 0.1",)
    assert Gates(max_kl=0.1).broken_by([variant("int4", 1, float("nan"))])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--to", "int3"), 2, "no such scheme"),
        (("--to", ""), 2, "no such scheme"),
        (("--to", "q8_0"), 2, "Did you mean gguf-q8_0?"),
        (("--to", "gguf-q4_k"), 3, "K-quants pack 256 values of a row together, and 32 is not a multiple"),
        (("--to", "gguf-Q4_K_M"), 3, "K-quants"),
        (("--to", "int8", "--group", "48"), 2, "multiples of 32"),
        (("--to", "int8", "--skip", "no_such"), 2, "no tensor has a name like this"),
        (("--to", "int8", "--skip", "re:("), 2, "not a regular expression"),
        (("--to", "int4", "--bits-map", "down_proj=5"), 2, "expected PATTERN=BITS"),
        (("--to", "bf16", "--skip", "down_proj"), 2, "do not apply to bf16"),
        (("--to", "int8-dynamic", "--bits-map", "down_proj=4"), 2, "does not apply"),
        (("--to", "int8-dynamic", "--calibrate"), 2, "does not apply"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    here: Path, smolctl: Callable[..., Called], arguments: tuple[str, ...], code: int, said: str
) -> None:
    called = smolctl("quantize", "runs/llama", "--out", "out", "--no-measure", *arguments)
    assert called.code == code
    assert said in called.err
    assert not Path("out").exists()


def test_learned_positions_have_no_gguf(here: Path, smolctl: Callable[..., Called]) -> None:
    called = smolctl("quantize", "runs/learned", "--to", "int8,gguf-q8_0", "--out", "out", "--no-measure")
    assert called.code == 3
    assert "learned positions" in called.err
    assert not Path("out").exists()


def test_preset_without_weights_is_refused(here: Path, smolctl: Callable[..., Called]) -> None:
    assert "has no weights" in smolctl("quantize", "nano").err


def test_weights_that_are_not_finite_are_refused(here: Path) -> None:
    from safetensors.torch import save_file

    Path("bad").mkdir()
    tensors = {name: tensor.float() for name, tensor in weights_of(open_source("runs/llama")).items()}
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, "bad/model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN"):
        quantize(
            "bad/model.safetensors", QuantizeOptions(out=Path("out"), measure=False, accept_guesses=True)
        )
