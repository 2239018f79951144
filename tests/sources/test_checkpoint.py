"""Checkpoints and run folders: what is read, what is refused, and what is never executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolctl.benchmark.engine_files import weight_files
from smolctl.config.dump import to_yaml
from smolctl.errors import InputError, SmolError
from smolctl.generation.engines import EngineOptions, make_engine
from smolctl.model.weights import initialize, load_network
from smolctl.runs.folder import RunFolder
from smolctl.runs.reference import split_step
from smolctl.runs.root import latest_run
from smolctl.sources import SourceKind, open_source
from smolctl.sources.checkpoint import clean_name
from smolctl.sources.huggingface.write import write_tokenizer
from smolctl.sources.open import require_own_files
from smolctl.sources.provenance import provenance_of
from tests.support.checkpoints import RUN, save_checkpoint
from tests.support.tiny_models import tiny_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tiny"
    for step in (500, 1000):
        save_checkpoint(folder / "checkpoints" / f"step-{step:06}.ckpt", step=step)
    (folder / "checkpoints" / ".step-001500.ckpt.partial").write_bytes(b"half")
    (folder / "config.yaml").write_text(to_yaml(RUN))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    return folder


def test_checkpoint_gives_config_weights_and_step(tmp_path: Path) -> None:
    source = open_source(str(save_checkpoint(tmp_path / "any.name")))
    assert source.kind is SourceKind.CHECKPOINT
    assert (source.config, source.run, source.step) == (RUN.model, RUN, 500)
    assert source.problems == ()
    expected = initialize(RUN.model, seed=500).state_dict()
    loaded = load_network(source).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "name",
    [
        "network.model.norm.weight",
        "network._orig_mod.model.norm.weight",
        "_orig_mod.network.model.norm.weight",
        "module.network.network.model.norm.weight",
        "model.norm.weight",
    ],
)
def test_wrappers_are_taken_off_names(name: str) -> None:
    assert clean_name(name) == "model.norm.weight"


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    state = {"network.model.norm.weight": torch.ones(1), "module.model.norm.weight": torch.ones(1)}
    path = save_checkpoint(tmp_path / "twice.ckpt", state_dict=state)
    with pytest.raises(InputError, match=r"contains model\.norm\.weight twice"):
        open_source(str(path))


def test_checkpoint_of_another_tool_is_read_by_its_shapes(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "other.ckpt", hyper_parameters={"lr": 0.1})
    source = open_source(str(path))
    assert source.recovered_from_shapes
    assert source.config is not None
    assert source.config.hidden_size == 64
    assert source.run is None


def test_a_bare_state_dict_is_read_too(tmp_path: Path) -> None:
    torch.save(initialize(RUN.model, seed=1).state_dict(), tmp_path / "pytorch_model.bin")
    assert load_network(open_source(str(tmp_path / "pytorch_model.bin"))).config.hidden_size == 64


class Attack:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved_as", ["state", "state_dict", "checkpoint of a module"])
def test_what_stock_quantize_dynamic_made_is_a_model(tmp_path: Path, saved_as: str, tied: bool) -> None:
    from torch.ao.quantization import quantize_dynamic

    # Shapes do not show the size of heads: these have the one that is taken for it.
    config = RUN.model.model_copy(
        update={
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "tie_word_embeddings": tied,
        }
    )
    network = initialize(config, 0).eval()
    stock = quantize_dynamic(network, {torch.nn.Linear}, dtype=torch.qint8)
    state = stock.state_dict()
    recipe = RUN.model_copy(update={"model": config}).model_dump(mode="json")
    content = {
        "state": state,
        "state_dict": {"state_dict": state},
        "checkpoint of a module": {
            "state_dict": {f"network.{name}": value for name, value in state.items()},
            "hyper_parameters": {"config": recipe},
        },
    }[saved_as]
    torch.save(content, tmp_path / "smollm2_135m_quantized.ckpt")
    source = open_source(str(tmp_path / "smollm2_135m_quantized.ckpt"))
    assert source.kind is SourceKind.QUANTIZED
    ids = torch.arange(12)
    engine = make_engine(source, EngineOptions())
    logits = engine.forward([ids.tolist()], engine.allocate(1, 12), every=True)
    assert torch.equal(torch.from_numpy(logits), stock(ids[None])[0])
    with torch.inference_mode():
        dense, exact = load_network(source)(ids[None]), network(ids[None])
    assert (dense - exact).norm() < 0.05 * exact.norm()


def test_code_in_a_checkpoint_is_named_and_never_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    path = save_checkpoint(tmp_path / "bad.ckpt", callbacks=Attack(trace))
    with pytest.raises(InputError, match=r"holds code: posix\.mkdir|holds code: nt\.mkdir") as caught:
        open_source(str(path))
    assert not trace.exists()
    assert "safetensors" in caught.value.hint


def test_a_bare_pickle_is_never_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps({"state_dict": Attack(trace)}))
    with pytest.raises(InputError, match="bare pickle"):
        open_source(str(tmp_path / "model.ckpt"))
    assert not trace.exists()


def test_zip_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(InputError, match="a zip archive, but not a PyTorch checkpoint"):
        open_source(str(tmp_path / "x.ckpt"))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ([1, 2], "not a checkpoint of a training run"),
        ({"epoch": 1}, "no state_dict; it holds epoch"),
        ({"state_dict": {}}, "contains no tensors"),
        ({"state_dict": {"a": 1}}, "contains no tensors"),
    ],
)
def test_checkpoint_without_weights_is_named(tmp_path: Path, content: Any, cause: str) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=cause):
        open_source(str(tmp_path / "x.ckpt"))


def test_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "x.ckpt")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut off"):
        open_source(str(path))


@given(share=st.floats(0, 1, exclude_max=True))
def test_truncating_a_checkpoint_anywhere_is_an_input_error(run: Path, share: float) -> None:
    whole = (run / "checkpoints" / "step-000500.ckpt").read_bytes()
    cut = run.parent / "cut.ckpt"
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(SmolError):
        open_source(str(cut))


def test_flipping_pickle_bytes_raises_only_our_errors(tmp_path: Path) -> None:
    """Every byte of the pickle in turn; its own checksum is mended, so that torch reads it."""
    small = {"state_dict": {"network.model.norm.weight": torch.ones(4)}, "global_step": 3}
    buffer = io.BytesIO()
    torch.save(small, buffer)
    with zipfile.ZipFile(buffer) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    flipped = tmp_path / "flipped.ckpt"
    outcomes = set()
    for at in range(len(records[name])):
        for value in (0x00, 0x80, 0xFF, records[name][at] ^ 1):
            data = bytearray(records[name])
            data[at] = value
            with zipfile.ZipFile(flipped, "w") as archive:
                for other, content in records.items():
                    archive.writestr(other, bytes(data) if other == name else content)
            try:
                open_source(str(flipped))
                outcomes.add("read")
            except SmolError:
                outcomes.add("refused")
    assert "refused" in outcomes


def test_run_opens_its_newest_checkpoint(run: Path) -> None:
    source = open_source(str(run))
    assert source.kind is SourceKind.RUN
    assert (source.step, source.config, source.run) == (1000, RUN.model, RUN)
    assert source.read_tokenizer() is not None
    assert load_network(source).config == RUN.model


def test_step_of_a_run_can_be_named(run: Path) -> None:
    assert open_source(f"{run}@500").step == 500
    with pytest.raises(InputError, match="no checkpoint of step 7") as caught:
        open_source(f"{run}@7")
    assert caught.value.hint == "There are: 500, 1000."


@pytest.mark.parametrize(
    "name", ["report.html", "loss.png", "metrics.jsonl", "environment.json", "tasks.json"]
)
def test_a_record_of_a_run_is_no_model_and_leads_to_the_run(run: Path, name: str) -> None:
    (run / name).write_text('{"hidden_size": 4}')
    with pytest.raises(InputError, match=rf"{name}: a record of a run, not a model") as caught:
        open_source(str(run / name))
    assert caught.value.hint == f"Name the run: {run}"


def test_weights_alone_take_the_tokenizer_beside_them(run: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": initialize(RUN.model, 0).state_dict()}, tmp_path / "bare.ckpt")
    assert open_source(str(tmp_path / "bare.ckpt")).read_tokenizer() is None
    tokenizer = tiny_tokenizer()
    write_tokenizer(tmp_path, tokenizer.files())
    found = open_source(str(tmp_path / "bare.ckpt")).read_tokenizer()
    assert found is not None
    assert found.tokenizer_json == tokenizer.files().tokenizer_json


def test_checkpoint_inside_a_run_finds_the_runs_tokenizer(run: Path) -> None:
    assert open_source(str(run / "checkpoints" / "step-000500.ckpt")).read_tokenizer() is not None


def test_damaged_newest_checkpoint_is_refused_and_the_newest_sound_one_named(run: Path) -> None:
    newest = run / "checkpoints" / "step-001000.ckpt"
    newest.write_bytes(newest.read_bytes()[:2000])
    for reference in (run, f"{run}@1000"):
        with pytest.raises(InputError, match="damaged") as caught:
            open_source(str(reference))
        assert f"{run}@500" in caught.value.hint
    assert open_source(f"{run}@500").step == 500


def test_run_with_damaged_checkpoints_only_says_so(run: Path) -> None:
    for path in (run / "checkpoints").glob("step-*.ckpt"):
        path.write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="damaged") as caught:
        open_source(str(run))
    assert caught.value.hint == "No other checkpoint is intact."


def test_run_without_checkpoints_still_opens(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    source = open_source(str(run))
    assert (source.config, source.weights, source.step) == (RUN.model, None, None)
    with pytest.raises(InputError, match="a run has no weights"):
        source.require_weights()


def test_latest_follows_the_link_else_the_newest_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = run.parent
    monkeypatch.chdir(root.parent)
    other = root / "newer"
    other.mkdir()
    (other / "config.yaml").write_text(to_yaml(RUN))
    os.utime(run / "config.yaml", (1, 1))
    assert latest_run(root) == other
    (root / "latest").symlink_to("tiny")
    assert latest_run(root) == root / "tiny"
    assert open_source("runs/latest").step == 1000
    assert open_source("runs/tiny@500").step == 500
    assert open_source("runs/latest@500").step == 500


def test_the_newest_run_is_found_where_the_link_to_it_is_gone(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent.parent)
    source = open_source("runs/latest")
    require_own_files(source)
    assert source.run_folder == RunFolder(Path("runs/tiny"))
    assert provenance_of(source).id == str(run)
    assert weight_files("runs/latest") == (Path("runs/tiny/checkpoints/step-001000.ckpt"),)


@pytest.mark.parametrize("target", [None, "deleted", "latest"])
def test_without_the_run_that_latest_named_every_door_takes_the_newest(
    target: str | None, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent.parent)
    if target:
        (run.parent / "latest").symlink_to(target)
    assert latest_run() == Path("runs/tiny")
    assert open_source("runs/latest").step == 1000


def test_missing_runs_are_named_with_those_there_are(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    with pytest.raises(InputError, match="runs/nope: no such run") as caught:
        open_source("runs/nope")
    assert "tiny" in caught.value.hint
    with pytest.raises(InputError, match="no run here"):
        latest_run(run.parent.parent / "elsewhere")


def test_steps_are_read_from_the_last_at_sign() -> None:
    assert split_step("runs/a@500") == (Path("runs/a"), 500)
    assert split_step("runs/a") == (Path("runs/a"), None)
    with pytest.raises(InputError, match="newest is not a step"):
        split_step("runs/a@newest")


def test_files_being_written_are_no_checkpoints(run: Path) -> None:
    assert [file.step for file in RunFolder(run).checkpoints()] == [500, 1000]
