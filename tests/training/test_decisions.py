"""What is decided for a device: precision, compile and accelerator, with devices that are not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from smolctl.config import RunConfig, load_run_config
from smolctl.errors import InputError
from smolctl.runs.events import Event, Note
from smolctl.training.device import Decisions, decide, decide_again, find_device, peak_flops
from tests.support.tiny_runs import go_on, prepare_tiny, run, state, with_steps, write_corpus

NO_GPU = None
T4, V100, A100, H100 = (7, 5), (7, 0), (8, 0), (9, 0)
NAMES = {
    T4: "Tesla T4",
    V100: "Tesla V100-SXM2-16GB",
    A100: "NVIDIA A100-SXM4-80GB",
    H100: "NVIDIA H100 PCIe",
}


def pretend(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, mps: bool = False, bf16: bool = False
) -> None:
    """Let PyTorch report a GPU of a compute capability, an Apple GPU, or a CPU with bfloat16 or without.

    What `is_bf16_supported` answers follows from the capability in PyTorch's own code.
    """

    class Properties:
        major, minor = capability or (0, 0)
        name = NAMES.get(capability or (0, 0), "")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device=None: Properties())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: Properties.name)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0" if capability else None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})


def decided(config: RunConfig) -> tuple[RunConfig, list[str]]:
    events: list[Event] = []
    found, _ = decide(config, events.append)
    return found, [event.text for event in events if isinstance(event, Note)]


@pytest.mark.parametrize(
    ("capability", "precision"),
    [(V100, "32-true"), (T4, "32-true"), (A100, "bf16-mixed"), (H100, "bf16-mixed"), (NO_GPU, "32-true")],
)
def test_bfloat16_is_taken_where_the_gpu_has_it_and_not_where_it_emulates_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, precision: str
) -> None:
    pretend(monkeypatch, capability)
    config, _ = decided(load_run_config("nano"))
    assert config.train.precision == precision
    assert config.trainer.accelerator == ("cuda" if capability else "cpu")
    assert "auto" not in (config.train.precision, config.train.compile, config.trainer.accelerator)


def test_an_apple_gpu_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, NO_GPU, mps=True)
    config, _ = decided(load_run_config("nano"))
    assert (config.trainer.accelerator, config.train.precision, config.train.compile) == (
        "mps",
        "32-true",
        False,
    )


@pytest.mark.parametrize("bf16", [True, False])
def test_a_cpu_with_bfloat16_keeps_float32_and_says_what_would_be_faster(
    monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    pretend(monkeypatch, NO_GPU, bf16=bf16)
    config, notes = decided(load_run_config("nano"))
    assert config.train.precision == "32-true"
    assert any("bf16-mixed" in note for note in notes) is bf16


@pytest.mark.parametrize("capability", [T4, V100])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_that_is_emulated_is_done_when_asked_and_said(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    pretend(monkeypatch, capability)
    config, notes = decided(load_run_config("nano", [f"train.precision={precision}"]))
    assert config.train.precision == precision
    assert any("emulates bfloat16" in note for note in notes)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_what_is_asked_for_is_not_decided(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    pretend(monkeypatch, H100)
    asked = load_run_config("nano", [f"train.precision={precision}", "trainer.accelerator=cpu"])
    config, _ = decided(asked)
    assert (config.train.precision, config.trainer.accelerator) == (precision, "cpu")


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, accelerator: str) -> None:
    pretend(monkeypatch, NO_GPU)
    with pytest.raises(InputError, match=f"accelerator {accelerator}: this machine has no such device"):
        find_device(accelerator)


def test_a_run_on_another_device_decides_again_and_names_every_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, H100)
    config, decisions = decide(load_run_config("nano", ["train.steps=5000"]), lambda _: None)
    assert decisions == Decisions(
        "NVIDIA H100 PCIe", ("train.precision", "train.compile", "trainer.accelerator")
    )
    again, _ = decide_again(config, decisions, {}, lambda _: None)
    assert again == config
    pretend(monkeypatch, T4)
    events: list[Event] = []
    moved, _ = decide_again(config, decisions, {}, events.append)
    assert (moved.train.precision, moved.train.compile) == ("32-true", True)
    assert any("trained on NVIDIA H100 PCIe; this device is Tesla T4" in str(event) for event in events)
    pretend(monkeypatch, NO_GPU)
    moved, _ = decide_again(config, decisions, {"train": {"precision": "bf16-mixed"}}, events.append)
    assert moved.trainer.accelerator == "cpu"
    assert moved.train.precision == "bf16-mixed"  # the user has just asked for it
    assert moved.train.compile is False


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def test_what_was_decided_is_written_down(corpus: Path) -> None:
    folder = run(prepare_tiny(corpus, **with_steps(2)), "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    expected = {"train.precision": "32-true", "train.compile": False, "trainer.accelerator": "cpu"}
    assert environment["decided"] == expected
    assert environment["decided_from_auto"] == list(expected)
    assert environment["device"] == "cpu"
    for key, value in expected.items():
        section, _, name = key.partition(".")
        assert config[section][name] == value
    assert state(folder, 2)["smolctl"]["decisions"] == {"device": "cpu", "asked": tuple(expected)}


def test_a_resumed_run_names_what_changes_on_another_device(corpus: Path) -> None:
    folder = run(prepare_tiny(corpus, train={"steps": 2, "precision": "bf16-mixed"}), "run")
    path = folder / "checkpoints" / "step-000002.ckpt"
    content = state(folder, 2)
    content["smolctl"]["decisions"] = {"device": "NVIDIA H100 PCIe", "asked": ("train.precision",)}
    torch.save(content, path)
    Path(f"{path}.sha256").unlink()
    notes = [event.text for event in go_on(folder, extra=1) if isinstance(event, Note)]
    assert "Changed: train.precision bf16-mixed → 32-true" in notes
    assert json.loads((folder / "environment.json").read_text())["earlier"][0]["decided"][
        "train.precision"
    ] == ("bf16-mixed")


@pytest.mark.parametrize(
    ("name", "half", "float32"),
    [
        ("Tesla T4", 65e12, 8.1e12),
        ("Tesla V100-SXM2-32GB", 125e12, 15.7e12),
        ("NVIDIA GeForce RTX 2080 Ti", 53.8e12, 13.4e12),
        ("NVIDIA GeForce RTX 3060 Ti", 32.4e12, 16.2e12),
        ("NVIDIA GeForce RTX 4070 SUPER", 71e12, 35.5e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12, 104.8e12),
        ("NVIDIA A10", 125e12, 62.5e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA GB10", 125e12, 62.5e12),
        ("NVIDIA A10G", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
    ],
)
def test_peaks_of_the_chips_that_people_have(name: str, half: float | None, float32: float | None) -> None:
    assert peak_flops(name, "16-mixed") == half
    assert peak_flops(name, "32-true") == float32
    emulates = any(chip in name for chip in ("T4", "V100", "RTX 20"))
    assert peak_flops(name, "bf16-mixed") == (None if emulates else half)


# float16 with a scaler


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "step"]


FLOAT16: dict[str, Any] = {"train": {"precision": "16-mixed", "steps": 6}}


def test_float16_trains_and_resumes_bit_for_bit_with_its_scaler(corpus: Path) -> None:
    from tests.support.tiny_runs import assert_same_run

    whole = run(prepare_tiny(corpus, **FLOAT16), "whole")
    parts = run(prepare_tiny(corpus, train={"precision": "16-mixed", "steps": 3}), "parts")
    assert "scaler" in state(parts, 3)["smolctl"]
    go_on(parts, until=6)
    assert_same_run(whole, parts, 6)
    assert state(whole, 6)["smolctl"]["scaler"]["_growth_tracker"] == 6
    exact = run(prepare_tiny(corpus, train={"steps": 6}), "exact")
    assert [line["loss"] for line in steps(whole)] == pytest.approx(
        [line["loss"] for line in steps(exact)], rel=2e-3
    )


def test_steps_that_overflow_are_skipped_and_counted_and_leave_the_weights_alone(corpus: Path) -> None:
    from tests.support.tiny_runs import assert_same

    overflow: dict[str, Any] = {"optimizer": {"learning_rate": 1e-3}, "checkpoint": {"every": 1}}
    prepared = prepare_tiny(corpus, train={"precision": "16-mixed", "steps": 4, "z_loss": 1e7}, **overflow)
    folder = run(prepared, "run")
    lines = steps(folder)
    skipped = [line["skipped"] for line in lines]
    assert skipped[0] == 1
    assert lines[0]["gradient_norm"] is None
    assert_same(state(folder, 0)["state_dict"], state(folder, 1)["state_dict"])
    assert state(folder, 1)["smolctl"]["scaler"]["scale"] == 2**15
    assert state(folder, 4)["smolctl"]["skipped"][0] == skipped[-1]


def test_ten_skipped_steps_in_a_row_stop_the_run(corpus: Path) -> None:
    from smolctl.training.guards import NonFiniteError

    prepared = prepare_tiny(corpus, train={"precision": "16-mixed", "steps": 15, "z_loss": 1e30})
    with pytest.raises(NonFiniteError, match=r"step 10: .* for the 10th time in a row"):
        run(prepared, "run")
