"""A stop and a resume change nothing, wherever the text comes from and however it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smolctl.config.load import merge, resolve_run_config
from smolctl.data.tokens import encoding, streamed
from smolctl.errors import InputError
from smolctl.runs.checkpoint_file import remove_checksum
from smolctl.runs.folder import RunFolder
from smolctl.training.prepare import Prepared, prepare
from smolctl.training.resume import ResumeOptions
from smolctl.training.verify import verify
from tests.support.dataset_hub import dataset
from tests.support.hub_server import HubServer
from tests.support.tiny_runs import (
    SHORT,
    TINY,
    assert_same_run,
    go_on,
    losses,
    prepare_tiny,
    run,
    with_steps,
    write_corpus,
)

Make = Callable[..., Prepared]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def small_stream(
    dataset_hub: HubServer, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> HubServer:
    """A dataset on a loopback Hub, org/rows, of which a run of six steps reads a part."""
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2_000)
    monkeypatch.setattr(streamed, "BLOCK_WINDOWS", 5)
    monkeypatch.setattr(streamed, "SEGMENT_TOKENS", (200, 200))
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    dataset_hub.repositories["datasets/org/rows"] = dataset(
        [f"{text} {n}" for n in range(6) for text in texts]
    )
    return dataset_hub


def make(*sources: str, weights: tuple[float, ...] | None = None, **changes: Any) -> Prepared:
    """A tiny run on sources."""
    values = merge(merge(TINY, {"data": {"source": list(sources), "weights": weights}}), changes)
    return prepare(resolve_run_config(values, "test"), None, lambda _event: None)


def assert_exact(prepared: Callable[..., Prepared]) -> Path:
    """Six steps, and three with three more, are the same run; returns the folder of the resumed one."""
    parts = run(prepared(**merge(SHORT, with_steps(3))), "parts")
    go_on(parts, extra=3)
    whole = run(prepared(**SHORT), "whole")
    assert_same_run(whole, parts, 6)
    assert verify(parts, ResumeOptions(), lambda _event: None).exact
    return parts


def test_interrupted_run_on_text_files_equals_continuous_run(corpus: Path) -> None:
    assert_exact(lambda **changes: prepare_tiny(corpus, **changes))


def test_interrupted_run_on_a_hub_dataset_equals_continuous_run(small_stream: HubServer) -> None:
    streamed_tokens = []

    def prepared(**changes: Any) -> Prepared:
        ready = make("org/rows", **changes)
        streamed_tokens.append(ready.corpus.tokens)
        return ready

    folder = assert_exact(prepared)
    assert streamed_tokens[0] < streamed_tokens[1]  # the longer run has streamed more
    assert RunFolder(folder).config().data.source == (
        f"org/rows@{small_stream.repositories['datasets/org/rows'].commit}",
    )


def test_a_resumed_run_streams_on_without_the_cache(
    small_stream: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(make("org/rows", **SHORT), "whole")
    parts = run(make("org/rows", **merge(SHORT, with_steps(3))), "parts")
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path / "empty"))
    go_on(parts, until=6)
    assert_same_run(whole, parts, 6)


def test_a_resumed_run_needs_no_hub_for_what_is_cached(small_stream: HubServer) -> None:
    whole = run(make("org/rows", **SHORT), "whole")  # fills the cache
    parts = run(make("org/rows", **merge(SHORT, with_steps(3))), "parts")
    small_stream.fails_with = 503
    go_on(parts, until=6)
    assert_same_run(whole, parts, 6)


def test_a_resumed_run_stays_on_its_commit_when_the_dataset_moves(small_stream: HubServer) -> None:
    folder = run(make("org/rows", **with_steps(6)), "moved")
    repository = small_stream.repositories["datasets/org/rows"]
    repository.commit = "fedcba98" * 5
    go_on(folder, extra=1)  # from the cache
    with pytest.raises(InputError, match=r"not the one that the run was trained on"):
        go_on(folder, extra=1, settings={"data": {"source": ["org/rows"]}})


def test_a_dataset_shorter_than_the_run_is_passed_over_again_exactly(small_stream: HubServer) -> None:
    small_stream.repositories["datasets/org/few"] = dataset(["the cat sat on a mat and saw birds " * 6] * 8)
    short: dict[str, Any] = {"data": {"validation_fraction": 0.0}}
    assert make("org/few", **short).corpus.train.parts[0].repeats
    assert_exact(lambda **changes: make("org/few", **merge(short, changes)))


def test_interrupted_run_on_a_mixture_equals_continuous_run(small_stream: HubServer, corpus: Path) -> None:
    mixture = (str(corpus), "org/rows")
    folder = assert_exact(lambda **changes: make(*mixture, weights=(0.6, 0.4), **changes))
    assert losses(folder) != losses(run(make(*mixture, weights=(0.4, 0.6), **SHORT), "other"))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("weights", [None, (0.6, 0.4)])
def test_interrupted_run_over_many_epochs_equals_continuous_run(
    tmp_path: Path, weights: tuple[float, float] | None, workers: int
) -> None:
    for name, words in (("a", "the cat sat on a mat "), ("b", "birds fly over trees and ")):
        (tmp_path / f"{name}.txt").write_text(words * 12)  # a few sequences, not a whole number of them

    def prepared(**changes: Any) -> Prepared:
        few = {"data": {"workers": workers, "validation_fraction": 0.0}}
        return make("a.txt", "b.txt", weights=weights, **merge(few, changes))

    tokens, stop = len(prepared().corpus.train), 3 * 4  # sequences before the stop
    assert stop * 32 > 2 * tokens
    assert stop % -(-tokens // 32)  # the stop is within an epoch
    assert_exact(prepared)


def test_a_run_in_the_order_of_an_older_version_is_refused_by_name(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(prepare_tiny(corpus, **with_steps(1)), "old")
    checkpoint = RunFolder(folder).checkpoint()
    content = torch.load(checkpoint.path, weights_only=True)
    del content["smolctl"]["order"]  # as versions before it was recorded wrote it
    remove_checksum(checkpoint.path)
    torch.save(content, checkpoint.path)
    monkeypatch.setattr("smolctl.training.prepare.tokenize_corpus", None)  # refused before any work
    with pytest.raises(InputError, match="splits the text into different sequences") as error:
        go_on(folder, extra=1)
    assert "--init-from" in error.value.hint


def test_interrupted_run_with_document_masking_equals_continuous_run(corpus: Path) -> None:
    masked = {"data": {"document_masking": True}, "model": {"attention_dropout": 0.2}}
    folder = assert_exact(lambda **changes: prepare_tiny(corpus, **merge(masked, changes)))
    plain = run(prepare_tiny(corpus, **merge(SHORT, {"model": {"attention_dropout": 0.2}})), "plain")
    assert losses(folder) != losses(plain)


@pytest.mark.slow
def test_interrupted_run_on_the_embedded_corpus_equals_continuous_run(corpus: Path, tmp_path: Path) -> None:
    prepare_tiny(corpus).tokenizer.save(tmp_path / "tokenizer")  # training one on all of it takes long
    assert_exact(lambda **changes: make("python", tokenizer=str(tmp_path / "tokenizer"), **changes))


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_run(small_stream: HubServer, corpus: Path) -> None:
    def prepared(workers: int, steps: int) -> Prepared:
        changes = {"data": {"workers": workers, "document_masking": True}, "train": {"steps": steps}}
        return make(str(corpus), "org/rows", weights=(1, 1), **changes)

    none = run(prepared(0, 15), "none")
    for workers in (1, 2):
        parts = run(prepared(workers, 6), f"workers-{workers}")
        go_on(parts, until=15)
        assert_same_run(none, parts)
