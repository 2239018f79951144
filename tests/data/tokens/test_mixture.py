"""Sources mixed by weight, and sample numbers that outlive a change of the batch size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from smolctl.config import load_run_config
from smolctl.config.data import DataConfig
from smolctl.config.load import resolve_run_config
from smolctl.data.batches import StepDataset, validation_batches
from smolctl.data.order import MIXTURE
from smolctl.data.tokenizer.tokenizer import train_tokenizer
from smolctl.data.tokens import encoding, streamed
from smolctl.data.tokens.corpus import TokenizedCorpus, tokenize_corpus
from smolctl.errors import InputError
from tests.support.dataset_hub import dataset
from tests.support.hub_server import HubServer

LENGTH = 8
TOKENIZER = train_tokenizer(iter(["abcdefghijklmnopqrstuvwxyz"]), 300)


def write(path: Path, letter: str, documents: int) -> str:
    """Different documents of one letter: every window tells where it comes from."""
    path.mkdir()
    for number in range(documents):
        (path / f"{number:04d}.txt").write_text(f"{letter * 40}{number:04d}")
    return str(path)


def mixed(tmp_path: Path, weights: Sequence[float] | None, **changes: object) -> TokenizedCorpus:
    names = [write(tmp_path / letter, letter, count) for letter, count in (("a", 200), ("b", 60))]
    return tokenize_corpus(config(names, weights, **changes), TOKENIZER, tmp_path / "cache", samples=5_000)


def config(names: Sequence[str], weights: Sequence[float] | None, **changes: object) -> DataConfig:
    values = {"source": tuple(names), "weights": weights, "sequence_length": LENGTH}
    return DataConfig.model_validate(values | {"validation_fraction": 0.1} | changes)


def letters(batch: torch.Tensor) -> list[str]:
    """The letter that fills each window of a batch."""
    return [max(TOKENIZER.decode(row.tolist())) for row in batch]


def test_samples_come_from_the_sources_in_the_given_shares(tmp_path: Path) -> None:
    corpus = mixed(tmp_path, (0.7, 0.3))
    steps = StepDataset(corpus.train, LENGTH, 100, seed=8)
    for first in (0, 10):
        seen = Counter(letter for step in range(first, first + 10) for letter in letters(steps[step]))
        assert seen == {"a": 700, "b": 300}
    assert 50 < Counter(letters(steps[3]))["a"] < 90  # mixed within a step, too


def test_every_source_is_passed_over_at_its_own_pace(tmp_path: Path) -> None:
    corpus = mixed(tmp_path, (1, 1))
    windows = [w for step in range(50) for w in StepDataset(corpus.train, LENGTH, 100, seed=8).windows(step)]
    for index, part in enumerate(corpus.train.parts):
        times = Counter(
            (window.start + token) % len(part.tokens)
            for window in windows
            if window.part == index
            for token in range(1, LENGTH + 1)
        )
        assert len(times) == len(part.tokens)  # all are trained on
        assert max(times.values()) - min(times.values()) <= 4


def test_validation_has_the_sources_in_their_shares(tmp_path: Path) -> None:
    corpus = mixed(tmp_path, (0.75, 0.25))
    assert corpus.validation is not None
    seen = Counter(
        letter for batch in validation_batches(corpus.validation, LENGTH, 4, 20) for letter in letters(batch)
    )
    assert seen == {"a": 15, "b": 5}


def test_weights_are_part_of_what_a_run_must_keep(tmp_path: Path) -> None:
    names = [write(tmp_path / letter, letter, 50) for letter in "ab"]
    prints = [
        tokenize_corpus(config(names, weights), TOKENIZER, tmp_path / "cache").fingerprint
        for weights in (None, (1, 1), (1, 2), (2, 4))
    ]
    assert len(set(prints)) == 3
    assert prints[2] == prints[3]


def test_one_source_with_a_weight_is_that_source(tmp_path: Path) -> None:
    name = write(tmp_path / "a", "a", 50)
    corpora = [
        tokenize_corpus(config([name], weights), TOKENIZER, tmp_path / "cache") for weights in (None, (3,))
    ]
    assert corpora[0].fingerprint == corpora[1].fingerprint
    first, second = (StepDataset(corpus.train, LENGTH, 4, seed=8)[7] for corpus in corpora)
    assert torch.equal(first, second)


def test_the_notes_name_the_shares(tmp_path: Path) -> None:
    notes = mixed(tmp_path, (2, 1)).notes
    assert "a: 66.7% of the samples" in notes[0]
    assert "b: 33.3% of the samples" in notes[1]


def test_a_dataset_of_a_mixture_is_streamed_by_its_share(
    dataset_hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2_000)
    monkeypatch.setattr(streamed, "BLOCK_WINDOWS", 10)
    monkeypatch.setattr(streamed, "SEGMENT_TOKENS", (500, 500))
    dataset_hub.repositories["datasets/org/bees"] = dataset(["b" * 40] * 2_000)
    names = [write(tmp_path / "a", "a", 50), "org/bees"]
    corpus = tokenize_corpus(config(names, (0.9, 0.1)), TOKENIZER, tmp_path / "cache", samples=1_500)
    _, bees = corpus.train.parts
    assert len(bees.tokens) == 200 * LENGTH + 1  # a tenth of two blocks of the mixture
    steps = StepDataset(corpus.train, LENGTH, MIXTURE // 4, seed=8)
    seen = Counter(letter for step in range(6) for letter in letters(steps[step]))
    assert seen["b"] in range(100, 201)
    assert sum(seen.values()) == 1_500


def test_wrong_weights_are_refused() -> None:
    for weights, reason in {
        (1.0,): "1 weights for 2 sources",
        (1.0, 0.0): "every weight must be above 0",
        (1.0, -2.0): "every weight must be above 0",
        (1.0, float("nan")): "must be a finite number",
        (10_000.0, 1.0): "at least a thousandth",
    }.items():
        with pytest.raises(InputError, match=reason):
            resolve_run_config({"data": {"source": ["a", "b"], "weights": weights}}, "test")


def test_sources_of_the_command_line_leave_the_weights_of_the_file_behind() -> None:
    assert load_run_config("smollm2-135m-pretrain").data.weights == (220, 28)
    assert load_run_config("smollm2-135m-pretrain", (), {"data": {"source": ["python"]}}).data.weights is None
    both = ["data.source=[a, b, c]", "data.weights=[1, 2, 3]"]
    assert load_run_config("smollm2-135m-pretrain", both).data.weights == (1, 2, 3)


@pytest.mark.parametrize("weights", [None, (0.7, 0.3)])
def test_another_batch_size_goes_on_behind_the_samples_already_seen(
    tmp_path: Path, weights: Sequence[float] | None
) -> None:
    tokens = mixed(tmp_path, weights).train
    small = StepDataset(tokens, LENGTH, 4, seed=8)
    assert small.samples_before(10) == 40
    large = StepDataset(tokens, LENGTH, 12, seed=8, first_step=10, first_sample=40)
    straight = [window for step in range(25) for window in small.windows(step)]
    changed = [window for step in range(10) for window in small.windows(step)]
    changed += [window for step in range(10, 15) for window in large.windows(step)]
    assert straight == changed
    halves = [
        StepDataset(tokens, LENGTH, 12, 8, rank, 2, first_step=10, first_sample=40).windows(11)
        for rank in (0, 1)
    ]
    assert halves[0] + halves[1] == large.windows(11)
