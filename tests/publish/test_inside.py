"""Nothing is published that only seems to lie in the folder, or that smolctl did not write."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

from smolctl.durable import file_digest
from smolctl.errors import InputError
from smolctl.ownership import RECORD, Record, require_inside, write_record
from smolctl.publish.build import add_quantized, left_out, open_model
from smolctl.publish.push import PushOptions, plan_push
from smolctl.quantization.folder import QUANTIZED_MODEL
from smolctl.quantization.quantize import QuantizeOptions, quantize
from tests.support.publishing import build_folder

SECRET = "nothing that anybody should read"


def link(place: Path, target: Path) -> None:
    """Put a link to `target` in the place of what is there."""
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(target)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with things that are not to be published."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "notes").write_text(SECRET)
    return folder


OF_RUN = (
    *("LICENSE", "README.md", "NOTICE.txt", "metrics.jsonl", "environment.json", "tasks.json"),
    "quantized/verdict.json",
)
FOLDERS_OF_RUN = ("tokenizer", "checkpoints")


@pytest.mark.parametrize("name", OF_RUN)
def test_a_link_out_of_a_run_is_refused(name: str, llama_run: Path, elsewhere: Path, tmp_path: Path) -> None:
    run = shutil.copytree(llama_run, tmp_path / "run")
    (run / name).parent.mkdir(exist_ok=True)
    link(run / name, elsewhere / "notes")
    with pytest.raises(InputError, match=f"{name} is refused, because it is a link to "):
        open_model(str(run))


@pytest.mark.parametrize("name", FOLDERS_OF_RUN)
def test_a_linked_folder_in_a_run_is_refused(name: str, llama_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(llama_run, tmp_path / "run")
    link(run / name, llama_run / name)
    with pytest.raises(InputError, match=f"{name}.* is refused, because it is a link to "):
        open_model(str(run))


def test_a_hard_link_with_a_name_elsewhere_is_refused(
    llama_run: Path, elsewhere: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(llama_run, tmp_path / "run")
    os.link(elsewhere / "notes", run / "LICENSE")
    with pytest.raises(InputError, match="LICENSE is refused, because it is a hard link"):
        open_model(str(run))
    (elsewhere / "notes").unlink()  # now the run's is its only name
    os.link(run / "LICENSE", run / "LICENSE.txt")  # and a second one inside is none elsewhere
    open_model(str(run))


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.json", "config.json", "model.safetensors", "README.md"]
)
def test_a_link_out_of_a_model_folder_is_refused_by_push_and_quantize(name: str, tmp_path: Path) -> None:
    folder = build_folder(tmp_path).folder
    original = tmp_path / "original"
    (folder / name).replace(original) if (folder / name).exists() else original.write_text("{{ messages }}")
    (folder / name).symlink_to(original)
    with pytest.raises(InputError, match="is a link to"):
        open_model(str(folder))
    is_carried = name not in ("README.md", "model.safetensors")
    with pytest.raises(InputError, match="is a link to") if is_carried else contextlib.nullcontext():
        quantize(str(folder), QuantizeOptions(out=tmp_path / "smaller", measure=False))
    assert (tmp_path / "smaller").exists() is not is_carried


def test_links_within_the_folder_and_the_cache_of_the_client_are_taken(tmp_path: Path) -> None:
    folder = build_folder(tmp_path).folder
    cache = tmp_path / "models--me--x"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    shutil.copytree(folder, snapshot)
    for number, path in enumerate(sorted(path for path in snapshot.iterdir() if path.is_file())):
        path.replace(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    open_model(str(snapshot))
    (tmp_path / "name").symlink_to(folder)
    (folder / "LICENSE").write_text("mine")
    (folder / "LICENSE.md").symlink_to("LICENSE")
    open_model(str(tmp_path / "name"))


def test_a_name_that_leads_upwards_is_outside(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text(SECRET)
    with pytest.raises(InputError):
        require_inside(tmp_path / "a", ["../b"])


@pytest.fixture
def quantized(llama_run: Path, tmp_path: Path) -> Path:
    """A run with a folder like `quantize` makes them, of its step 15."""
    run = shutil.copytree(llama_run, tmp_path / "run")
    folder = run / "quantized" / "int8"
    folder.mkdir(parents=True)
    description = {
        "format": "smolctl-quantized",
        "version": 1,
        "scheme": "int8",
        "source": {"id": "/home/me/run", "step": 15},
        "config_sha256": "",
        "file": {"bytes": 2, "sha256": "", "header_sha256": ""},
        "tensors": {},
    }
    (folder / "quantization.json").write_text(json.dumps(description))
    for name in ("model.safetensors", "config.json", "run_quantized.ckpt"):
        (folder / name).write_text("{}")
    write_record(folder, Record(QUANTIZED_MODEL, {path.name: file_digest(path) for path in folder.iterdir()}))
    return run


def test_of_a_quantized_folder_goes_up_what_quantize_wrote(quantized: Path, tmp_path: Path) -> None:
    folder = quantized / "quantized" / "int8"
    (folder / "diary.txt").write_text(SECRET)
    (folder / "chat_template.jinja").write_text(SECRET)  # a name that quantize may write, and did not
    (folder / "more").mkdir()
    (folder / "more" / "diary.txt").write_text(SECRET)
    (folder / "linked").symlink_to(tmp_path)
    shutil.copytree(folder, quantized / "quantized" / "theirs", symlinks=True)
    (quantized / "quantized" / "theirs" / RECORD).unlink()
    taken = add_quantized(quantized, tmp_path / "out", 15)
    assert taken == ("int8",)
    there = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert there == ["config.json", "model.safetensors", "quantization.json"]
    assert "/home" not in (tmp_path / "out" / "int8" / "quantization.json").read_text()
    stays = left_out(quantized, {"quantized"}, taken)
    strange = ("chat_template.jinja", "diary.txt", "linked", "more/diary.txt")
    assert {f"quantized/int8/{name}" for name in strange} <= set(stays)
    assert "quantized/theirs/" in stays


@pytest.mark.parametrize("place", ["quantized/int8/config.json", "quantized/int8", "quantized"])
def test_no_link_in_a_quantized_folder_is_followed(
    place: str, quantized: Path, elsewhere: Path, tmp_path: Path
) -> None:
    (quantized / place).replace(elsewhere / "moved")
    (quantized / place).symlink_to(elsewhere / "moved")
    with pytest.raises(InputError, match="is a link to"):
        add_quantized(quantized, tmp_path / "out", 15)


def test_an_edited_file_of_a_quantized_folder_is_refused(quantized: Path, tmp_path: Path) -> None:
    (quantized / "quantized" / "int8" / "config.json").write_text(SECRET)
    with pytest.raises(InputError, match=r"config\.json: was edited after smolctl wrote it"):
        add_quantized(quantized, tmp_path / "out", 15)


def test_the_plan_names_what_stays(llama_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(llama_run, tmp_path / "run")
    (run / "diary.txt").write_text(SECRET)
    out = tmp_path / "out"
    out.mkdir()
    plan = plan_push(PushOptions(str(run)), out)
    assert "diary.txt" in plan.built.left_out
    assert not any(SECRET.encode() in file.local.read_bytes() for file in plan.model.files)
