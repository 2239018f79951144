"""The lines of the project's brief, as people type them, with our module and stock Lightning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from smolctl.errors import InputError
from smolctl.model.weights import load_network
from smolctl.runs.events import Step
from smolctl.runs.folder import RunFolder
from smolctl.sources import open_source
from smolctl.training.module import TrainingModule
from smolctl.training.prepare import Prepared
from tests.support.processes import Called
from tests.support.tiny_runs import assert_same, go_on, run, state, with_steps


@pytest.fixture
def prepared(make: Callable[..., Prepared]) -> Prepared:
    return make(**with_steps(5))


@pytest.fixture
def checkpoint(prepared: Prepared, once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A checkpoint of a finished run, moved away from it."""
    folder = shutil.copytree(once("five-steps", lambda made: run(prepared, f"{made}/run")) / "run", "run")
    return Path(shutil.copy(f"{folder}/checkpoints/final.ckpt", "smollm2_135m.ckpt"))


def loader(prepared: Prepared) -> DataLoader[torch.Tensor]:
    return DataLoader(prepared.dataset(), batch_size=None, sampler=range(5))


def small_trainer(steps: int) -> Trainer:
    return Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )


def test_a_checkpoint_loads_into_a_module_that_predicts(checkpoint: Path) -> None:
    module = TrainingModule.load_from_checkpoint("smollm2_135m.ckpt")
    network = load_network(open_source("smollm2_135m.ckpt"))
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(module.eval()(ids), network(ids))
    assert module.model is module.network
    text = module.generate("the cat", max_tokens=5)
    assert text == TrainingModule.load_from_checkpoint("smollm2_135m.ckpt").generate("the cat", max_tokens=5)


def test_a_loaded_module_is_trained_fifty_steps_more_by_a_stock_trainer(
    checkpoint: Path, prepared: Prepared
) -> None:
    module = TrainingModule.load_from_checkpoint("smollm2_135m.ckpt")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer = small_trainer(50)
    trainer.fit(module, loader(prepared))
    assert trainer.global_step == 50
    assert module.result is not None
    assert module.result.loss is not None
    assert any(not torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    trainer.save_checkpoint("smollm2_135m_final.ckpt")
    again = TrainingModule.load_from_checkpoint("smollm2_135m_final.ckpt")
    assert_same(dict(again.state_dict()), dict(module.state_dict()))
    assert open_source("smollm2_135m_final.ckpt").read_tokenizer() is not None
    torch.load("smollm2_135m_final.ckpt", weights_only=True)


def test_the_learning_rate_goes_on_where_the_checkpoint_was(checkpoint: Path, prepared: Prepared) -> None:
    module = TrainingModule.load_from_checkpoint("smollm2_135m.ckpt")
    small_trainer(1).fit(module, loader(prepared))
    assert module.result is not None
    (line,) = [event for event in go_on(Path("run"), extra=1) if isinstance(event, Step)]
    assert module.result.learning_rate == line.learning_rate


def test_a_saved_state_dict_is_read_back(checkpoint: Path) -> None:
    module = TrainingModule.load_from_checkpoint("smollm2_135m.ckpt")
    torch.save({"state_dict": module.state_dict()}, "state.ckpt")
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        logits = load_network(open_source("smollm2_135m.ckpt"))(ids)
        assert torch.equal(load_network(open_source("state.ckpt"))(ids), logits)


@pytest.mark.parametrize("name", ["model", "network"])
def test_stock_dynamic_quantization_quantizes_what_is_saved_and_read_back(
    checkpoint: Path, name: str, smolctl: Callable[..., Called]
) -> None:
    from torch.ao.quantization import quantize_dynamic

    module = TrainingModule.load_from_checkpoint("smollm2_135m.ckpt").eval()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        before = module(ids)
        setattr(module, name, quantize_dynamic(getattr(module, name), {nn.Linear}, dtype=torch.qint8))
        after = module(ids)
    assert not torch.equal(before, after)
    assert (before - after).abs().max() < 0.1 * before.abs().max()
    torch.save({"state_dict": module.state_dict()}, "smollm2_135m_quantized.ckpt")
    source = open_source("smollm2_135m_quantized.ckpt")
    assert source.kind == "quantized"
    with torch.inference_mode():
        logits = load_network(source, dtype=torch.float32)(ids)
    assert (logits - before).abs().max() < 0.1 * before.abs().max()


def test_a_checkpoint_alone_goes_on_exactly(checkpoint: Path) -> None:
    from smolctl.training.resume import ResumeOptions, resume

    go_on(Path("run"), extra=3)
    result = resume(Path("smollm2_135m.ckpt"), ResumeOptions(extra=3), lambda _event: None)
    assert result.folder == Path("runs/smollm2_135m-001")
    assert_same(
        RunFolder(result.folder).checkpoint(8).path.stat().st_size,
        RunFolder(Path("run")).checkpoint(8).path.stat().st_size,
    )

    for part in ("state_dict", "optimizer_states"):
        assert_same(state(result.folder, 8)[part], state(Path("run"), 8)[part])
    lineage = json.loads((result.folder / "lineage.json").read_text())
    assert (lineage["parent"], lineage["step"]) == ("smollm2_135m.ckpt", 5)
    assert (result.folder / "tokenizer" / "tokenizer.json").is_file()


def test_a_checkpoint_inside_a_run_resumes_the_run(checkpoint: Path) -> None:
    go_on(Path("run/checkpoints/final.ckpt"), extra=1)
    assert [file.step for file in RunFolder(Path("run")).checkpoints()] == [0, 5, 6]


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "smollm2_135m.ckpt", "--prompt", "the cat", "--max-tokens", "3"),
        ("quantize", "smollm2_135m.ckpt", "--to", "int8", "--out", "q"),
        ("push", "smollm2_135m.ckpt", "--local-dir", "d"),
        ("resume", "smollm2_135m.ckpt", "--extra", "1"),
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_every_command_takes_a_moved_checkpoint(
    checkpoint: Path, smolctl: Callable[..., Called], arguments: tuple[str, ...]
) -> None:
    shutil.rmtree("run")
    called = smolctl(*arguments)
    assert called.code == 0, called.err


def test_weights_that_were_not_trained_here_cannot_be_resumed_but_can_be_trained_on(checkpoint: Path) -> None:
    from smolctl.training.resume import ResumeOptions, resume

    torch.save({"state_dict": TrainingModule.load_from_checkpoint(checkpoint).state_dict()}, "bare.ckpt")
    with pytest.raises(InputError, match="no run can be resumed from it") as error:
        resume(Path("bare.ckpt"), ResumeOptions(extra=1), lambda _event: None)
    assert "--init-from" in error.value.hint
