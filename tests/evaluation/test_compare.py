"""Models on the same documents: what is scored, what is said of it, and what is refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from smolctl.data.tokenizer.tokenizer import Tokenizer, train_tokenizer
from smolctl.errors import InputError, SmolError, UsageError
from smolctl.evaluation.compare import CompareOptions, Comparison, compare
from tests.support.processes import Smolctl
from tests.support.tiny_models import TEXTS, tiny_tokenizer, write_folder
from tests.support.tiny_runs import prepare_tiny, run

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "saw", "Größe", "界面", "12", "in"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine documents, all but one shorter than the longest context."""
    folder, chance = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for number in range(9):
        length = 80 if number == 3 else 20 + number
        (folder / f"{number}.txt").write_text(" ".join(chance.choice(WORDS, length)))
    return folder


def on(texts: Path, *models: Path, **options: int) -> Comparison:
    return compare(list(map(str, models)), CompareOptions((str(texts),), **options))


def change(folder: Path, changed: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The model with another token table, which is its head too."""
    file = folder / "model.safetensors"
    state = load_file(file)
    state["model.embed_tokens.weight"] = changed(state["model.embed_tokens.weight"])
    save_file(state, file, {"format": "pt"})
    return folder


def test_a_model_differs_from_itself_by_exactly_nothing(texts: Path, tmp_path: Path) -> None:
    model = write_folder(tmp_path / "a")
    (pair,) = on(texts, model, model).pairs
    assert (pair.difference.mean, pair.difference.margin) == (0.0, 0.0)
    assert pair.better is None
    assert "difference 0" in pair.verdict


def test_the_order_of_the_models_changes_the_sign_alone(texts: Path, tmp_path: Path) -> None:
    a, b = write_folder(tmp_path / "a", seed=0), write_folder(tmp_path / "b", seed=1)
    (there,), (back,) = on(texts, a, b).pairs, on(texts, b, a).pairs
    assert there.difference.mean == -back.difference.mean
    assert there.difference.margin == back.difference.margin
    assert (there.better and there.better.models) == (back.better and back.better.models)


@pytest.mark.parametrize("context", [3, 16, 96])
def test_every_token_of_a_long_document_is_scored_once(texts: Path, tmp_path: Path, context: int) -> None:
    """A model whose head is zero gives every token the same probability."""
    model = change(write_folder(tmp_path / "a"), torch.zeros_like)
    found = on(texts, model, model, context=context)
    expected = found.measures[0].tokens * math.log2(320) / found.text.bytes
    assert found.measures[0].bits_per_byte.mean == pytest.approx(expected, rel=1e-6)
    assert found.measures[0].tokens > 400


def test_the_shortest_context_is_that_of_all(texts: Path, tmp_path: Path) -> None:
    short = write_folder(tmp_path / "short", context=16)
    assert on(texts, write_folder(tmp_path / "long"), short).context == 16
    with pytest.raises(UsageError, match="short has 16 positions"):
        on(texts, short, short, context=17)


def test_other_tokenizers_are_compared_on_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    a, b = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    other = train_tokenizer(iter(TEXTS), 280)
    Tokenizer(other.backend, bos_token_id=0, eos_token_id=2).save(b)
    for model in (a, b):
        change(model, torch.zeros_like)
    found = on(texts, a, b)
    fine, coarse = (one.tokens for one in found.measures)
    assert fine < coarse
    gap = (fine - coarse) * math.log2(320) / found.text.bytes
    (pair,) = found.pairs
    assert pair.difference.mean == pytest.approx(gap, rel=1e-6)
    assert [item.key for item in pair.differences][-1] == "entries of the tokenizer"


def test_what_predicts_nan_is_broken_and_never_wins(texts: Path, tmp_path: Path, smolctl: Smolctl) -> None:
    sound = write_folder(tmp_path / "sound")
    broken = change(write_folder(tmp_path / "broken"), lambda table: torch.full_like(table, math.nan))
    (pair,) = on(texts, broken, sound).pairs
    assert pair.better is pair.b
    assert pair.verdict == "A: broken, predicts NaN or infinite values"
    (pair,) = on(texts, broken, broken).pairs
    assert pair.better is None
    gate = ("--data", texts, "--require-better")
    failed = smolctl("compare", broken, sound, *gate, "--json")
    assert failed.code == 5
    assert failed.json["measures"][0]["broken"] is True
    assert failed.json["measures"][0]["bits_per_byte"] is None
    assert smolctl("compare", sound, broken, *gate).code == 0


def test_few_documents_are_resampled_in_parts_and_this_is_said(tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("the cat sat on the mat. " * 500)
    found = on(text, write_folder(tmp_path / "a"), write_folder(tmp_path / "b", seed=1))
    assert (found.observations, found.by_document) == (3, False)
    assert "do not cover other documents" in found.notes[0]


@pytest.mark.parametrize("text", ["a", "the cat sat on the mat. " * 20])
def test_a_text_that_is_too_short_for_an_interval_is_refused(
    text: str, tmp_path: Path, smolctl: Smolctl
) -> None:
    (tmp_path / "one.txt").write_text(text)
    model = write_folder(tmp_path / "a")
    called = smolctl("compare", model, model, "--data", tmp_path / "one.txt", "--quiet")
    assert called.code == 3
    assert called.out == ""
    cause, remedy = called.err.splitlines()
    assert cause.endswith("in one document, which is too little for an interval")
    assert "two documents, or on more than 4,096 bytes" in remedy


def test_of_text_beyond_the_limit_some_documents_are_taken(texts: Path, tmp_path: Path) -> None:
    model = write_folder(tmp_path / "a")
    found = on(texts, model, model, bytes=300).text
    assert found.bytes <= 300
    assert found.left_out == 9 - len(found.documents) > 0
    whole = {path.read_text() for path in texts.iterdir()}
    assert all(any(text.startswith(str(one)) for text in whole) for one in found.documents)
    assert len(found.documents) >= 5
    assert found.longest == 300 // 8


@pytest.mark.parametrize("lone", [True, False])
def test_nothing_to_compare_is_refused(lone: bool, tmp_path: Path) -> None:
    model = str(write_folder(tmp_path / "a"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError if lone else InputError) as refused:
        compare([model] * (1 if lone else 2), CompareOptions((str(tmp_path / "empty.txt"),)))
    assert isinstance(refused.value, SmolError)
    assert refused.value.hint


def test_runs_are_compared_on_what_they_have_held_out(here: Path, smolctl: Smolctl) -> None:
    done = smolctl("compare", "runs/learned", "runs/llama", "--json")
    assert done.code == 0, done.err
    document = done.json
    assert document["text"]["name"].startswith("held-out part of")
    held_out = 30 * 0.2
    assert 0 < document["text"]["documents"] < 2.5 * held_out
    assert {"text", "context", "resampled", "observations", "resamples", "confidence"} <= document.keys()
    assert [one["label"] for one in document["measures"]] == ["A", "B"]
    (pair,) = document["pairs"]
    assert {"a", "b", "difference", "low", "high", "better", "detectable", "verdict"} <= pair.keys()
    assert pair["low"] <= pair["difference"] <= pair["high"]
    keys = {item["key"] for item in pair["differences"]}
    assert keys == {"position_embedding", "residual_scale"}
    assert "add runs that differ only in train.seed" in done.json["notes"][-1]
    shown = smolctl("compare", "runs/learned@5", "runs/learned")
    assert "B is better than A by" in shown.out
    assert "step" in shown.out


@pytest.mark.slow
def test_runs_that_differ_in_the_seed_only_count_as_one(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {"base": {}, "wide": {"model": {"initializer_range": 0.2}}}
    names = []
    for recipe, change in changes.items():
        for seed in (1, 2):
            settings = {**change, "train": {"seed": seed, "steps": 5}}
            names.append(str(run(prepare_tiny(workshop / "corpus", **settings), f"runs/{recipe}-{seed}")))
    found = compare(names)
    assert [one.models for one in found.measures] == [tuple(names[:2]), tuple(names[2:])]
    assert [one.seeds for one in found.measures] == [(1, 2), (1, 2)]
    assert all((one.seed_deviation or 0) > 0 for one in found.measures)
    assert [item.key for item in found.pairs[0].differences] == ["initializer_range"]
    assert not any("one seed" in note for note in found.notes)
    assert [one.models for one in compare(names[:2]).measures] == [(names[0],), (names[1],)]


@pytest.mark.slow
def test_the_difference_is_that_of_losses_that_transformers_computes(texts: Path, tmp_path: Path) -> None:
    """Recomputed with NumPy from the loss of every document; the long one does not fit and is left out."""
    from transformers import LlamaForCausalLM

    short = Path(shutil.copytree(texts, tmp_path / "short"))
    (short / "3.txt").unlink()
    models = [write_folder(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    tokenizer = tiny_tokenizer()
    documents = [path.read_text() for path in sorted(short.iterdir())]
    sizes = np.array([len(text.encode()) for text in documents])
    nats = []
    for model in models:
        network = LlamaForCausalLM.from_pretrained(model)
        for text in documents:
            ids = torch.tensor([[tokenizer.end_of_text_id, *tokenizer.encode(text)]])
            with torch.inference_mode():
                loss = network(ids, labels=ids).loss.item()
            nats.append(loss * (ids.shape[1] - 1))
    bits = np.array(nats).reshape(2, -1) / math.log(2)
    found = on(short, *models)
    for one, expected in zip(found.measures, bits.sum(1) / sizes.sum(), strict=True):
        assert one.bits_per_byte.mean == pytest.approx(expected, rel=1e-5)
    gap = (bits[0] - bits[1]).sum() / sizes.sum()
    assert found.pairs[0].difference.mean == pytest.approx(gap, abs=1e-5)
    spread = bits[0] - bits[1] - gap * sizes
    error = math.sqrt((spread**2).sum() / (len(sizes) - 1) / len(sizes)) / sizes.mean()
    assert found.pairs[0].difference.standard_error == pytest.approx(error, rel=1e-3)
