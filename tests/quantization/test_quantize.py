"""`smolctl quantize`: folders that load everywhere, verdicts, gates, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from smolctl.errors import InputError, SmolError, UsageError
from smolctl.generation.load import load_model
from smolctl.quantization.build import build_items, dequantized, read_tensors
from smolctl.quantization.footprint import measure_footprint
from smolctl.quantization.quantize import QuantizeOptions, quantize
from smolctl.quantization.schemes import GGUF_SCHEMES, SchemeOptions, plan_quantization
from smolctl.sources import open_source
from smolctl.sources.base import ModelSource, SourceKind
from smolctl.sources.quantized.packed import PackedMatrix
from smolctl.sources.quantized_folder import DESCRIPTION, FILE
from tests.support.disks import small_disk
from tests.support.processes import ADDRESS, Called, call
from tests.support.quantized_folders import make_quantized

TABLE = "model.embed_tokens.weight"


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


@pytest.mark.parametrize("model", ["runs/llama", "runs/learned"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "bf16", "int8-dynamic"])
def test_folder_holds_exactly_what_was_computed(here: Path, model: str, scheme: str) -> None:
    make_quantized(model, scheme)
    source, written = open_source(model), open_source("out")
    plan = plan_quantization(source.require_config(), scheme, SchemeOptions())
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
    make_quantized("runs/learned", scheme)
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
    make_quantized(scheme="int4")
    stored = dict(open_source("out").require_weights().stored())
    matrices = {name: item for name, item in stored.items() if isinstance(item, PackedMatrix)}
    assert matrices[TABLE].bits == 8
    assert {item.bits for name, item in matrices.items() if name != TABLE} == {4}
    assert open_source("out").kind is SourceKind.QUANTIZED
    assert all(isinstance(stored[name], np.ndarray) for name in stored if "norm" in name)


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic"])
def test_tied_table_is_stored_once(here: Path, scheme: str) -> None:
    make_quantized(scheme=scheme)
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
    make_quantized(
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
    sizes = [
        make_quantized(scheme="int8", out=f"g{group}", group=group).variants[0].bytes for group in (32, 64)
    ]
    assert sizes[1] < sizes[0]
    load_model("g64")


def test_bf16_of_a_llama_loads_in_transformers(here: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_quantized(scheme="bf16")
    theirs = AutoModelForCausalLM.from_pretrained("out")
    ours = weights_of(open_source("out"))
    assert torch.equal(theirs.model.layers[1].mlp.up_proj.weight, ours["model.layers.1.mlp.up_proj.weight"])
    assert theirs.dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", GGUF_SCHEMES)
def test_gguf_file_is_a_model(here: Path, scheme: str) -> None:
    report = make_quantized(scheme=scheme, out="files")
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


def test_names_are_the_models_and_not_those_of_its_old_format(here: Path) -> None:
    make_quantized("runs/llama", "gguf-q8_0", "files")
    Path("files/llama-q8_0.gguf").rename("files/llama.Q8_0.gguf")
    report = make_quantized("files/llama.Q8_0.gguf", "gguf-q4_0", "files")
    assert report.variants[0].path == "files/llama-q4_0.gguf"


def test_plan_of_a_gguf_names_its_blocks(here: Path) -> None:
    plan = " ".join(make_quantized("runs/llama", "gguf-q4_0", "files").variants[0].plan)
    assert "q8_0" in plan
    assert "q4_0" in plan
    assert "int4" not in plan


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
        (lambda data: data.replace(b'"scheme": "int', b'"scheme": "nf'), DESCRIPTION, "scheme: .* 'int8'"),
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
    make_quantized(scheme=scheme)
    damage(change, file)
    called = smolctl("sample", "out", "--prompt", "the cat", "--max-tokens", "2")
    assert called.code == 3
    assert len(called.err.splitlines()) == 2
    assert "unexpected" not in called.err
    assert re.search(said, called.err), called.err


@pytest.mark.parametrize(
    ("scheme", "label"),
    [
        *(("int8", label) for label in ("int8-dynamic", "bf16")),
        *(("int4", label) for label in ("int8", "int8-dynamic", "bf16")),
        *(("int8-dynamic", label) for label in ("int8", "int4", "bf16")),
    ],
)
def test_a_folder_under_the_name_of_another_scheme_is_refused(here: Path, scheme: str, label: str) -> None:
    make_quantized(scheme=scheme)
    damage(
        lambda data: data.replace(b'"scheme": "' + scheme.encode(), b'"scheme": "' + label.encode()),
        DESCRIPTION,
    )
    with pytest.raises(InputError, match=rf"is stored as the scheme {label} stores no tensor"):
        open_source("out")


def test_weights_of_another_model_are_refused(here: Path) -> None:
    make_quantized("runs/llama", "int8", "out")
    make_quantized("runs/llama", "int4", "other")
    Path("out", FILE).write_bytes(Path("other", FILE).read_bytes())
    with pytest.raises(InputError, match=r"has no model\.|does not list|were written"):
        open_source("out")


def test_missing_weights_are_named(here: Path) -> None:
    make_quantized()
    Path("out", FILE).unlink()
    with pytest.raises(InputError, match="missing"):
        open_source("out")


def test_nothing_is_overwritten_without_force(here: Path) -> None:
    make_quantized()
    with pytest.raises(UsageError, match="not empty"):
        make_quantized(scheme="int4")
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
        make_quantized(scheme=scheme, out=str(small / "out"))
    assert [path for path in small.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "gguf-q8_0"])
def test_write_that_fails_half_way_leaves_nothing(here: Path, scheme: str) -> None:
    command = ("quantize", "runs/llama", "--to", scheme, "--out", "new/out", "--no-measure")
    done = call(20_000, *command, module="tests.support.small_files")
    assert done.code == 1, done.err
    assert "cannot be written" in done.err
    assert "None" not in done.err
    assert "unexpected" not in done.err
    assert not Path("new").exists()


@pytest.mark.parametrize("scheme", ["int8", "gguf-q8_0"])
def test_rename_that_fails_loses_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, smolctl: Callable[..., Called], scheme: str
) -> None:
    """The old result stands as before, and nothing lies beside it."""
    report = make_quantized(scheme=scheme, out="out")
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


def test_default_is_the_newest_run_in_int8_beside_it(here: Path, smolctl: Callable[..., Called]) -> None:
    called = smolctl("quantize", "--no-measure")
    assert called.code == 0, called.err
    assert "runs/llama/quantized/int8" in called.err
    assert "not measured" in called.out
    assert smolctl("quantize", "runs/llama", "--no-measure").code == 2
    assert smolctl("quantize", "runs/llama", "--no-measure", "--force").code == 0


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


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--to", "int3"), 2, "no such scheme"),
        (("--to", ""), 2, "--to is empty"),
        (("--to", "q8_0"), 2, "Did you mean gguf-q8_0?"),
        (("--to", "gguf-q4_k"), 3, "K-quants pack 256 values of a row together, and 32 is not a multiple"),
        (("--to", "gguf-Q4_K_M"), 3, "K-quants"),
        (("--to", "int8", "--group", "48"), 2, "multiples of 32"),
        (("--to", "int8", "--group", "1000000000"), 2, "no row has more than"),
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
