"""Hub datasets: streamed as far as they are needed, further later, and always the same."""

from __future__ import annotations

import json
import random
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolctl.config.data import DataConfig
from smolctl.data.text.corpus import iter_texts, pin_sources
from smolctl.data.text.hub import DatasetName
from smolctl.data.tokenizer.tokenizer import train_tokenizer
from smolctl.data.tokens import encoding, streamed
from smolctl.data.tokens.cache import MANIFEST
from smolctl.data.tokens.corpus import TokenizedCorpus, TokenizeProgress, tokenize_corpus
from smolctl.data.tokens.mixture import Mixture
from smolctl.errors import ExitCode, HubError, InputError, SmolError
from tests.support.dataset_hub import dataset, parquet
from tests.support.hub_server import HubRepository, HubServer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "twelve", "birds", "fly", "over", "trees"]
CHANCE = random.Random(0)
TEXTS = [f"{number} " + " ".join(CHANCE.choices(WORDS, k=40)) for number in range(400)]
TOKENIZER = train_tokenizer(iter(TEXTS), 320)
LENGTH = 16
BLOCK = 8  # windows
MOVED = "fedcba98" * 5


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 3_000)
    monkeypatch.setattr(streamed, "BLOCK_WINDOWS", BLOCK)
    monkeypatch.setattr(streamed, "SEGMENT_TOKENS", (500, 1_000))


@pytest.fixture
def rows(dataset_hub: HubServer) -> HubRepository:
    """400 short documents in four files on the Hub as org/rows."""
    repository = dataset(TEXTS)
    dataset_hub.repositories["datasets/org/rows"] = repository
    return repository


def data(source: str = "org/rows", fraction: float = 0.3, **changes: Any) -> DataConfig:
    settings = {"source": (source,), "sequence_length": LENGTH, "validation_fraction": fraction} | changes
    return DataConfig.model_validate(settings)


def tokenize(cache: Path, samples: int | None, config: DataConfig | None = None) -> TokenizedCorpus:
    return tokenize_corpus(config or data(), TOKENIZER, cache, samples=samples)


def tokens(mixture: Mixture | None) -> list[int]:
    parts = () if mixture is None else mixture.parts
    return [token for part in parts for token in part.tokens.read(0, len(part.tokens)).tolist()]


def shards(corpus: TokenizedCorpus) -> dict[str, bytes]:
    """Every shard of a corpus with its bytes."""
    (folder,) = corpus.folders
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.bin"))}


def files_asked_for(hub: HubServer) -> set[str]:
    return {path for request in hub.log if (path := request.path.rpartition("/")[2]).endswith(".parquet")}


def test_no_more_is_streamed_than_the_run_needs(
    dataset_hub: HubServer, rows: HubRepository, tmp_path: Path
) -> None:
    corpus = tokenize(tmp_path, samples=BLOCK + 1)
    assert len(corpus.train) == 2 * BLOCK * LENGTH + 1  # whole blocks of windows
    assert corpus.documents < 100
    assert files_asked_for(dataset_hub) == {"train-00000-of-00004.parquet"}


def test_a_stream_that_grew_is_the_stream_read_at_once(rows: HubRepository, tmp_path: Path) -> None:
    at_once = tokenize(tmp_path / "one", samples=600)
    for samples in (1, BLOCK, 50, 130, 131, 300, 600):
        grown = tokenize(tmp_path / "two", samples=samples)
        assert grown.fingerprint == at_once.fingerprint
        assert tokens(grown.validation) == tokens(at_once.validation)
        order = [corpus.train.windows(np.arange(samples), LENGTH, 8) for corpus in (grown, at_once)]
        assert order[0] == order[1]
        assert all(
            np.array_equal(grown.train.read(window, LENGTH), at_once.train.read(window, LENGTH))
            for window in order[0]
        )
    assert shards(grown) == shards(at_once)
    assert len(shards(grown)) > 10


def test_every_document_is_trained_on_once_or_held_out(rows: HubRepository, tmp_path: Path) -> None:
    corpus = tokenize(tmp_path, samples=None)
    parts = (corpus.train, corpus.validation)
    found = [TOKENIZER.decode(tokens(part), skip_special=False).split("<|endoftext|>")[:-1] for part in parts]
    assert sorted(found[0] + found[1]) == sorted(TEXTS)
    assert found[0] == [text for text in TEXTS if text in set(found[0])]  # in order
    numbers = [int(text.split()[0]) for text in found[1]]
    assert numbers
    assert max(numbers) < 30  # held out of the beginning only, which every run reads
    assert corpus.documents == len(TEXTS)
    assert corpus.bytes == sum(map(len, TEXTS))


def test_what_is_cached_is_not_tokenized_again(
    dataset_hub: HubServer, rows: HubRepository, tmp_path: Path
) -> None:
    before = tokenize(tmp_path, samples=500)
    dataset_hub.log.clear()
    seen: list[TokenizeProgress] = []
    after = tokenize_corpus(data(), TOKENIZER, tmp_path, seen.append, samples=600)
    added = after.tokens - before.tokens
    assert added > 0
    assert seen[-1].tokens < added + 4_000  # a batch before, to find the place, and a batch behind
    assert seen[-1].tokens < before.tokens


def test_a_pinned_dataset_in_the_cache_needs_no_network(
    dataset_hub: HubServer, rows: HubRepository, tmp_path: Path
) -> None:
    (pinned,) = pin_sources(["org/rows"])
    config = data(pinned)
    first = tokenize(tmp_path, 50, config)
    dataset_hub.log.clear()
    assert tokenize(tmp_path, 50, config).fingerprint == first.fingerprint
    assert dataset_hub.log == []


def test_a_run_stays_on_the_commit_that_it_began_with(rows: HubRepository, tmp_path: Path) -> None:
    (pinned,) = pin_sources(["org/rows"])
    assert pinned == f"org/rows@{rows.commit}"
    first = tokenize(tmp_path, 50)
    rows.files.update(dataset(list(reversed(TEXTS))).files)
    rows.commit = MOVED
    moved = tokenize(tmp_path, 50)
    assert moved.fingerprint != first.fingerprint
    assert tokens(moved.train) != tokens(first.train)
    assert tokens(tokenize(tmp_path, 50, data(pinned)).train) == tokens(first.train)


def test_a_dataset_that_ends_is_read_again(rows: HubRepository, tmp_path: Path) -> None:
    corpus = tokenize(tmp_path, samples=100_000)
    (part,) = corpus.train.parts
    count = -(-len(part.tokens) // LENGTH)
    assert corpus.documents == len(TEXTS)
    for start in (0, count, 2 * count):
        seen = corpus.train.windows(np.arange(start, start + count), LENGTH, seed=8)
        tokens = {(window.start + token) % len(part.tokens) for window in seen for token in range(LENGTH)}
        assert tokens == set(range(len(part.tokens)))


def test_a_sample_beyond_what_was_streamed_is_an_error(rows: HubRepository, tmp_path: Path) -> None:
    corpus = tokenize(tmp_path, samples=BLOCK)
    with pytest.raises(IndexError, match=f"sample {BLOCK} of a stream of which {BLOCK} sequences"):
        corpus.train.windows(np.arange(1, BLOCK + 1), LENGTH, seed=8)


def test_no_validation_is_told_and_the_last_tokens_are_never_taken(
    rows: HubRepository, tmp_path: Path
) -> None:
    corpus = tokenize(tmp_path, 50, data(fraction=1e-6))
    assert corpus.validation is None
    assert "there is no validation" in corpus.notes[0]
    assert tokenize(tmp_path, 50, data(fraction=0)).notes == ()


@pytest.mark.parametrize("damage", ["cut", "flip", "manifest", "gone"])
def test_a_damaged_segment_is_streamed_again(rows: HubRepository, tmp_path: Path, damage: str) -> None:
    first = tokenize(tmp_path, samples=300)
    expected, (folder,) = shards(first), first.folders
    shard = folder / "segment-00002" / "train-00000.bin"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif damage == "flip":
        shard.write_bytes(b"\0\1" + shard.read_bytes()[2:])
    elif damage == "gone":
        shard.unlink()
    else:
        (shard.parent / MANIFEST).write_text("{")
    notes: list[str] = []
    again = tokenize_corpus(data(), TOKENIZER, tmp_path, samples=300, on_note=notes.append)
    assert shards(again) == expected
    assert len(notes) == 1
    assert "segment-00002: the cached tokens are damaged" in notes[0]


def test_what_is_held_out_is_left_out_where_it_comes_again(dataset_hub: HubServer, tmp_path: Path) -> None:
    dataset_hub.repositories["datasets/org/again"] = dataset(TEXTS[:40] * 5)
    for samples in (50, 100, None):  # of one segment, and of several
        corpus = tokenize(tmp_path, samples, data("org/again"))
        parts = (corpus.train, corpus.validation)
        train, held_out = (
            set(TOKENIZER.decode(tokens(part), skip_special=False).split("<|endoftext|>")[:-1])
            for part in parts
        )
        assert held_out
        assert not train & held_out
    assert corpus.documents == 200
    assert train == set(TEXTS[:40]) - held_out


def test_an_interruption_leaves_the_segments_that_were_finished(rows: HubRepository, tmp_path: Path) -> None:
    def interrupt(progress: TokenizeProgress) -> None:
        if progress.documents > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(data(), TOKENIZER, tmp_path / "cache", interrupt, samples=600)
    manifests = list((tmp_path / "cache").rglob(MANIFEST))
    assert 3 < len(manifests) < 20
    assert not list((tmp_path / "cache").rglob("*.partial"))
    whole = tokenize(tmp_path / "other", samples=600)
    assert shards(tokenize(tmp_path / "cache", samples=600)) == shards(whole)


def test_the_beginning_of_a_dataset_can_be_held_out(
    rows: HubRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolctl.data.tokens.corpus.HELD_OUT_SEQUENCES", 20)
    (tmp_path / "a.txt").write_text("the cat sat on a mat " * 50)
    corpus = tokenize(tmp_path, 100, data(str(tmp_path / "a.txt"), validation="org/rows"))
    assert TOKENIZER.decode(tokens(corpus.train)) == "the cat sat on a mat " * 50
    held_out = TOKENIZER.decode(tokens(corpus.validation))
    assert len(tokens(corpus.validation)) == 24 * LENGTH + 1  # whole blocks
    assert "".join(TEXTS).startswith(held_out)


def test_empty_rows_are_no_documents(dataset_hub: HubServer, tmp_path: Path) -> None:
    texts = [text for one in TEXTS[:80] for text in (None, "", one)]
    dataset_hub.repositories["datasets/org/holes"] = dataset(texts)
    for samples in (10, 100, None):
        corpus = tokenize(tmp_path, samples, data("org/holes", fraction=0))
    assert corpus.documents == 80
    assert TOKENIZER.decode(tokens(corpus.train)) == "".join(TEXTS[:80])


def test_manifest_of_a_segment_is_plain_and_complete(rows: HubRepository, tmp_path: Path) -> None:
    (folder,) = tokenize(tmp_path, samples=50).folders
    manifest = json.loads((folder / "segment-00001" / MANIFEST).read_text())
    assert manifest["source"] == f"org/rows@{rows.commit}"
    assert manifest["tokenizer"] == TOKENIZER.sha256
    assert manifest["ended"] is False
    assert manifest["documents"] > manifest["bookmark"]["documents"] > 0


def test_a_tokenizer_is_trained_on_a_stream_too(rows: HubRepository) -> None:
    assert "".join(iter_texts(data())) == "".join(TEXTS)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name:config-1.0", ("org/name", None, "config-1.0")),
        ("org/name@v1.0:en", ("org/name", "v1.0", "en")),
        ("org/name@refs/convert/parquet", ("org/name", "refs/convert/parquet", None)),
    ],
)
def test_names_of_datasets(name: str, parts: tuple[str, str | None, str | None]) -> None:
    parsed = DatasetName.parse(name)
    assert parsed == DatasetName(*parts)
    assert str(parsed) == name
    for other in ("name", "./name", "/org/name", "../org/name", "org/name@", "org/name:", "a/b/c"):
        assert DatasetName.parse(other) is None


def refusal(source: str, tmp_path: Path, **changes: Any) -> SmolError:
    with pytest.raises(SmolError) as caught:
        tokenize(tmp_path, 50, data(source, **changes))
    error = caught.value
    assert error.message.startswith(source.partition(":")[0])  # a commit may stand behind the name
    assert error.hint
    assert "\n" not in error.message + error.hint
    return error


def test_a_hub_that_refuses_the_connection_is_told_at_once(
    dataset_hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        for name in ("org/rows", f"org/rows@{MOVED}"):  # with a commit nothing is asked before the rows are
            started = time.monotonic()
            error = refusal(name, tmp_path)
            assert time.monotonic() - started < 5
            assert isinstance(error, HubError)
            assert "cannot be reached" in error.message


def test_refusals_say_what_is_wrong(dataset_hub: HubServer, rows: HubRepository, tmp_path: Path) -> None:
    assert "not on the Hub" in refusal("org/nothing", tmp_path).message
    assert "no such revision" in refusal("org/rows@v9", tmp_path).message
    assert "'nowhere' not found" in refusal("org/rows:nowhere", tmp_path).message
    missing = refusal("org/rows", tmp_path, text_field="body")
    assert "row 1: no field 'body'; it has 'text', 'number'" in missing.message
    assert missing.exit_code == ExitCode.BAD_INPUT
    dataset_hub.repositories["datasets/org/none"] = HubRepository({"train.parquet": parquet(["", None])})
    assert "no text" in refusal("org/none", tmp_path).message
    assert not list(tmp_path.rglob(MANIFEST))
    dataset_hub.fails_with = 503
    assert "503" in refusal("org/rows", tmp_path).message


def test_the_split_that_is_named_is_read(dataset_hub: HubServer, tmp_path: Path) -> None:
    dataset_hub.repositories["datasets/org/chats"] = HubRepository(
        {
            "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n"
            b"  - {split: train_sft, path: one.parquet}\n  - {split: test_sft, path: two.parquet}\n---\n",
            "one.parquet": parquet(TEXTS[:20]),
            "two.parquet": parquet(TEXTS[20:40]),
        }
    )
    corpus = tokenize(tmp_path, None, data("org/chats", fraction=0, split="test_sft"))
    assert TOKENIZER.decode(tokens(corpus.train)) == "".join(TEXTS[20:40])
    assert "org/chats" in corpus.read[0]
    assert "split test_sft of the Hub dataset" in corpus.read[0]
    other = tokenize(tmp_path, None, data("org/chats", fraction=0, split="train_sft"))
    assert other.fingerprint != corpus.fingerprint
    error = refusal("org/chats", tmp_path)
    assert "no split 'train'; it has " in error.message
    assert "'train_sft'" in error.message
    assert "data.split" in error.hint


def test_a_text_file_is_one_document_on_the_hub_as_on_disk(dataset_hub: HubServer, tmp_path: Path) -> None:
    texts = ["one line\nand another\n\nand a third\n" * 20, "a second file\n" * 30]
    dataset_hub.repositories["datasets/org/books"] = HubRepository(
        {f"{number}.txt": text.encode() for number, text in enumerate(texts)}
    )
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    there = tokenize(tmp_path, None, data("org/books", fraction=0))
    files = tuple(str(tmp_path / f"{number}.txt") for number in (0, 1))
    here = tokenize(tmp_path, None, data(fraction=0).model_copy(update={"source": files}))
    assert there.documents == here.documents == 2
    assert tokens(there.train) == tokens(here.train)


def test_too_short_a_dataset_names_both_numbers(dataset_hub: HubServer, tmp_path: Path) -> None:
    dataset_hub.repositories["datasets/org/short"] = HubRepository({"train.parquet": parquet(["cat"])})
    error = refusal("org/short", tmp_path, fraction=0)
    assert f"tokens to train on; a sequence takes sequence_length + 1 = {LENGTH + 1}" in error.message


def test_a_dataset_beside_other_sources_needs_weights(rows: HubRepository, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("cat " * 500)
    config = data(source="x").model_copy(update={"source": ("org/rows", str(tmp_path / "a.txt"))})
    with pytest.raises(InputError, match="cannot be shuffled together") as caught:
        tokenize(tmp_path, 50, config)
    assert "data.weights=[1, 1]" in caught.value.hint
