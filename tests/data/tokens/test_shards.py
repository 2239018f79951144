"""Tokenized corpora: exact, whole or absent, found again, split by document."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolctl.config.data import DataConfig
from smolctl.data.batches import validation_batches
from smolctl.data.tokenizer.tokenizer import train_tokenizer
from smolctl.data.tokens import encoding
from smolctl.data.tokens.cache import MANIFEST
from smolctl.data.tokens.corpus import TokenizedCorpus, TokenizeProgress, tokenize_corpus
from smolctl.data.tokens.mixture import Mixture
from smolctl.data.tokens.shards import ShardWriter, TokenStream, token_dtype
from smolctl.durable import DiskError
from smolctl.errors import InputError

STORY = "Once upon a time there was a cat. It sat on the mat, 12 days long.\n"
TOKENIZER = train_tokenizer(iter([STORY * 3]), 300)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2000)


def write_lines(path: Path, count: int = 200) -> list[str]:
    texts = [f"{STORY}{number}" for number in range(count)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return texts


def data(*sources: Path | str, length: int = 16, fraction: float = 0.1, seed: int = 8) -> DataConfig:
    return DataConfig(
        source=tuple(map(str, sources)), sequence_length=length, validation_fraction=fraction, seed=seed
    )


def tokens(mixture: Mixture | None) -> list[int]:
    parts = () if mixture is None else mixture.parts
    return [token for part in parts for token in part.tokens.read(0, len(part.tokens)).tolist()]


def by_document(ids: list[int]) -> list[str]:
    assert ids[-1] == TOKENIZER.end_of_text_id
    return TOKENIZER.decode(ids, skip_special=False).removesuffix("<|endoftext|>").split("<|endoftext|>")


def nothing_looks_finished(cache: Path) -> bool:
    return not list(cache.rglob(MANIFEST)) and not list(cache.rglob("*.partial"))


def test_every_document_is_in_one_part_and_ends_with_end_of_text(tmp_path: Path) -> None:
    texts = write_lines(tmp_path / "a.jsonl")
    corpus = tokenize_corpus(data(tmp_path / "a.jsonl"), TOKENIZER, tmp_path)
    train, held_out = by_document(tokens(corpus.train)), by_document(tokens(corpus.validation))
    assert sorted(train + held_out) == sorted(texts)
    assert 5 <= len(held_out) <= 40
    assert corpus.notes == ()
    assert corpus.documents == 200
    assert corpus.bytes == sum(map(len, texts))
    assert corpus.tokens == len(tokens(corpus.train)) + len(tokens(corpus.validation))


@pytest.mark.parametrize("length", [16, 400])
@pytest.mark.parametrize("fraction", [0.004, 0.05, 0.3])
def test_equal_documents_are_held_out_together(tmp_path: Path, fraction: float, length: int) -> None:
    texts = 3 * write_lines(tmp_path / "a.jsonl", 60)
    random.Random(0).shuffle(texts)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    corpus = tokenize_corpus(
        data(tmp_path / "a.jsonl", fraction=fraction, length=length), TOKENIZER, tmp_path
    )
    train, held_out = (set(by_document(tokens(part))) for part in (corpus.train, corpus.validation))
    assert held_out
    assert not train & held_out
    assert train | held_out == set(texts)
    assert (corpus.documents, corpus.duplicates) == (180, 120)


def test_documents_that_are_all_equal_are_not_held_out_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"text": STORY * 9})] * 20))
    corpus = tokenize_corpus(data(tmp_path / "a.jsonl"), TOKENIZER, tmp_path)
    assert corpus.validation is None
    assert "Only 1 of 20 documents are different" in corpus.notes[0]


def test_held_out_documents_depend_on_their_content_alone(tmp_path: Path) -> None:
    texts = write_lines(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in [*texts, "more", "and more"][::-1])
    )

    def held_out(name: str, seed: int) -> set[str]:
        corpus = tokenize_corpus(data(tmp_path / name, seed=seed), TOKENIZER, tmp_path)
        return set(by_document(tokens(corpus.validation)))

    first = held_out("a.jsonl", 8)
    assert 5 <= len(first) <= 40
    assert held_out("a.jsonl", 9) == first
    assert held_out("b.jsonl", 8) - {"more", "and more"} == first
    assert len(list((tmp_path / "tokens").glob("*/"))) == 2  # another seed is no reason to encode again


def test_a_file_of_its_own_is_held_out_as_a_whole(tmp_path: Path) -> None:
    texts = write_lines(tmp_path / "a.jsonl", 100)
    (tmp_path / "own.txt").write_text(STORY * 3)
    config = data(tmp_path / "a.jsonl").model_copy(update={"validation": str(tmp_path / "own.txt")})
    corpus = tokenize_corpus(config, TOKENIZER, tmp_path)
    assert by_document(tokens(corpus.validation)) == [STORY * 3]
    assert by_document(tokens(corpus.train)) == texts
    assert corpus.notes == ()
    (tmp_path / "own.txt").write_text(STORY * 4)
    assert tokenize_corpus(config, TOKENIZER, tmp_path).fingerprint != corpus.fingerprint


def test_a_held_out_file_that_is_trained_on_too_is_said(tmp_path: Path) -> None:
    texts = write_lines(tmp_path / "a.jsonl", 100)
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*texts[:7], "new"]))
    config = data(tmp_path / "a.jsonl").model_copy(update={"validation": str(tmp_path / "own.jsonl")})
    assert (
        "own.jsonl: 7 of its documents are also trained on"
        in (tokenize_corpus(config, TOKENIZER, tmp_path).notes[0])
    )


def test_a_short_text_is_trained_on_up_to_the_share_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(STORY * 30)
    corpus = tokenize_corpus(data(tmp_path / "a.txt", length=256), TOKENIZER, tmp_path)
    assert 2 * 256 < corpus.tokens < 4 * 256
    assert len(corpus.train) >= 0.89 * corpus.tokens
    assert corpus.validation is not None
    (batch,) = validation_batches(corpus.validation, 256, 8, 8)
    assert batch.tolist() == [tokens(corpus.validation)]  # one sequence, shorter than the others'


def test_manifest_describes_the_shards(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl")
    corpus = tokenize_corpus(data(tmp_path / "a.jsonl"), TOKENIZER, tmp_path)
    manifest = json.loads((corpus.folders[0] / MANIFEST).read_text())
    assert manifest["tokenizer"] == TOKENIZER.sha256
    assert manifest["sources"] == [str(tmp_path / "a.jsonl")]
    assert (manifest["documents"], manifest["tokens"], manifest["bytes"]) == (
        corpus.documents,
        corpus.tokens,
        corpus.bytes,
    )
    for shard in manifest["train"] + manifest["held_out"]:
        content = (corpus.folders[0] / shard["file"]).read_bytes()
        assert len(content) == 2 * shard["tokens"]
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]


def test_long_text_file_equals_its_encoding(tmp_path: Path) -> None:
    text = STORY * 3000  # many pieces, many batches, one document
    (tmp_path / "a.txt").write_text(text)
    corpus = tokenize_corpus(data(tmp_path / "a.txt", fraction=0), TOKENIZER, tmp_path)
    assert tokens(corpus.train) == [*TOKENIZER.encode(text), TOKENIZER.end_of_text_id]
    assert corpus.validation is None
    assert corpus.documents == 1


def test_one_document_holds_out_its_last_tokens_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(STORY * 300)
    corpus = tokenize_corpus(data(tmp_path / "a.txt"), TOKENIZER, tmp_path)
    everything = [*TOKENIZER.encode(STORY * 300), TOKENIZER.end_of_text_id]
    assert tokens(corpus.train) + tokens(corpus.validation) == everything
    assert len(tokens(corpus.validation)) == round(0.1 * len(everything))
    assert "the last" in corpus.notes[0]


@pytest.mark.parametrize("seed", range(12))
def test_chance_never_holds_out_most_of_the_text(tmp_path: Path, seed: int) -> None:
    (tmp_path / "a.txt").write_text(STORY * 1000)
    (tmp_path / "b.txt").write_text(STORY * 2)
    config = data(tmp_path / "a.txt", tmp_path / "b.txt", fraction=0.05, seed=seed)
    corpus = tokenize_corpus(config, TOKENIZER, tmp_path)
    assert len(corpus.train) >= 0.5 * corpus.tokens
    assert corpus.validation is not None
    assert len(corpus.validation) > config.sequence_length


def test_corpus_too_short_to_hold_anything_out_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(STORY)
    corpus = tokenize_corpus(data(tmp_path / "a.txt", length=20), TOKENIZER, tmp_path)
    assert corpus.validation is None
    assert len(corpus.train) == corpus.tokens
    assert "no validation" in corpus.notes[0]


def test_corpus_shorter_than_a_window_names_both_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("cat")
    count = len(TOKENIZER.encode("cat")) + 1
    with pytest.raises(InputError, match=rf"has {count} tokens; .* = 1,025"):
        tokenize_corpus(data(tmp_path / "a.txt", length=1024), TOKENIZER, tmp_path)


def test_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(InputError, match=r"empty: no text in .*a\.txt, .*b\.jsonl"):
        tokenize_corpus(data(tmp_path / "a.txt", tmp_path / "b.jsonl"), TOKENIZER, tmp_path)
    assert nothing_looks_finished(tmp_path)


def test_binary_corpus_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(STORY * 2000)
    (tmp_path / "b.txt").write_bytes(b"\x00" * 9)
    with pytest.raises(InputError, match=r"b\.txt: not a text file"):
        tokenize_corpus(data(tmp_path / "a.txt", tmp_path / "b.txt"), TOKENIZER, tmp_path)
    assert nothing_looks_finished(tmp_path)


def test_second_call_does_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "a.jsonl")
    config = data(tmp_path / "a.jsonl")
    first = tokenize_corpus(config, TOKENIZER, tmp_path)
    monkeypatch.setattr("smolctl.data.tokens.whole._build", None)  # would fail if called
    again = tokenize_corpus(config, TOKENIZER, tmp_path)
    assert again.fingerprint == first.fingerprint
    assert tokens(again.train) == tokens(first.train)
    longer = tokenize_corpus(data(tmp_path / "a.jsonl", length=32), TOKENIZER, tmp_path)
    assert longer.folders[0] == first.folders[0]  # the length of a window is no reason to encode again


def test_what_changes_the_tokens_changes_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path)
    other_tokenizer = train_tokenizer(iter([STORY]), 280)
    corpora = [
        tokenize_corpus(data(path), TOKENIZER, tmp_path),
        tokenize_corpus(data(path, fraction=0.2), TOKENIZER, tmp_path),
        tokenize_corpus(data(path), other_tokenizer, tmp_path),
    ]
    write_lines(path, 201)
    corpora.append(tokenize_corpus(data(path), TOKENIZER, tmp_path))
    assert len({corpus.fingerprint for corpus in corpora}) == len(corpora)
    assert len({corpus.folders[0] for corpus in corpora}) == len(corpora)


def test_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path / "there"))
    write_lines(tmp_path / "a.jsonl")
    corpus = tokenize_corpus(data(tmp_path / "a.jsonl"), TOKENIZER)
    assert corpus.folders[0].parent == tmp_path / "there" / "tokens"


def test_interrupted_tokenization_leaves_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl")

    def interrupt(progress: TokenizeProgress) -> None:
        if progress.documents > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(data(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / "cache", interrupt)
    assert nothing_looks_finished(tmp_path / "cache")
    assert tokenize_corpus(data(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / "cache").documents == 200


KILLED = """
import sys
from pathlib import Path
from smolctl.config.data import DataConfig
from smolctl.data.tokens import encoding
from smolctl.data.tokens.corpus import tokenize_corpus
from smolctl.data.tokenizer.tokenizer import load_tokenizer
encoding.BATCH_CHARACTERS = 2000
source, tokenizer, cache = sys.argv[1:]
def wait(progress):
    if progress.documents > 50:
        print("now", flush=True)
        sys.stdin.read()
config = DataConfig(source=(source,), sequence_length=16, validation_fraction=0.1)
tokenize_corpus(config, load_tokenizer(tokenizer), Path(cache), wait)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_tokenization_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl")
    TOKENIZER.save(tmp_path / "tokenizer")
    command = [
        sys.executable,
        "-c",
        KILLED,
        *map(str, (tmp_path / "a.jsonl", tmp_path / "tokenizer", tmp_path)),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        assert list(tmp_path.rglob("*.partial"))
        (tmp_path / "c.txt").write_text(STORY * 30)
        tokenize_corpus(data(tmp_path / "c.txt"), TOKENIZER, tmp_path)
        assert list(tmp_path.rglob("*.partial"))  # a living one's are left alone
        process.kill()
    assert len(list(tmp_path.rglob(MANIFEST))) == 1  # of the other text
    (tmp_path / "b.txt").write_text(STORY * 20)
    tokenize_corpus(data(tmp_path / "b.txt"), TOKENIZER, tmp_path)  # another text
    assert not list(tmp_path.rglob("*.partial"))  # the dead one's leftovers are gone
    assert tokenize_corpus(data(tmp_path / "a.jsonl"), TOKENIZER, tmp_path).documents == 200


def test_concurrent_calls_work_once_and_agree(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", 500)
    working: list[int] = []
    results: list[TokenizedCorpus] = []
    notes: list[str] = []

    def run(number: int) -> None:
        def on_progress(_: TokenizeProgress) -> None:
            working.append(number)
            time.sleep(0.001)

        results.append(
            tokenize_corpus(data(tmp_path / "a.jsonl"), TOKENIZER, tmp_path, on_progress, None, notes.append)
        )

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(working)) == 1
    assert len({result.fingerprint for result in results}) == 1
    assert len(results) == 4
    assert len(notes) == 3
    assert all("Waiting for another process" in note for note in notes)


def flip(path: Path) -> None:
    """Other bytes in a file of the same size, written a while ago."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    settle(path)


def settle(path: Path) -> None:
    os.utime(path, (time.time() - 60, time.time() - 60))


def rewrite(folder: Path, name: str, shard: bytes) -> None:
    """A file of tokens, and a manifest that agrees with it."""
    (folder / name).write_bytes(shard)
    manifest = json.loads((folder / MANIFEST).read_text())
    for part in manifest["train"] + manifest["held_out"]:
        if part["file"] == name:
            part["sha256"] = hashlib.sha256(shard).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage", ["truncate", "remove", "flip", "flip held out", "ids", "manifest", "version", "tokenizer"]
)
def test_damaged_cache_is_rebuilt_and_that_is_said(tmp_path: Path, damage: str) -> None:
    write_lines(tmp_path / "a.jsonl")
    config = data(tmp_path / "a.jsonl")
    first = tokenize_corpus(config, TOKENIZER, tmp_path)
    expected = tokens(first.train)
    (folder,) = first.folders
    for file in folder.iterdir():
        settle(file)
    notes: list[str] = []
    assert tokenize_corpus(config, TOKENIZER, tmp_path, on_note=notes.append).fingerprint == first.fingerprint
    assert not notes  # and every file counts as checked
    shard, manifest = folder / "train-00000.bin", folder / MANIFEST
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif damage == "remove":
        shard.unlink()
    elif damage.startswith("flip"):
        flip(shard if damage == "flip" else folder / "held-out-0-00000.bin")
    elif damage == "ids":
        content = np.fromfile(shard, "<u2")
        content[7] = TOKENIZER.vocab_size
        rewrite(folder, shard.name, content.tobytes())
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:100])
    else:
        change = {"format": 0} if damage == "version" else {"tokenizer": "0" * 64}
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    again = tokenize_corpus(config, TOKENIZER, tmp_path, on_note=notes.append)
    assert tokens(again.train) == expected
    assert again.fingerprint == first.fingerprint
    assert len(notes) == 1
    assert "damaged" in notes[0]
    assert "tokenized again" in notes[0]


def test_a_manifest_with_keys_of_a_later_version_is_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", 50)
    config = data(tmp_path / "a.jsonl")
    (folder,) = tokenize_corpus(config, TOKENIZER, tmp_path).folders
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest |= {"colour": "red"}
    manifest["train"][0]["compressed"] = False
    (folder / MANIFEST).write_text(json.dumps(manifest))
    notes: list[str] = []
    tokenize_corpus(
        config,
        TOKENIZER,
        tmp_path,
        on_progress=lambda _: pytest.fail("tokenized again"),
        on_note=notes.append,
    )
    assert not notes
    assert json.loads((folder / MANIFEST).read_text()) == manifest


@pytest.mark.parametrize(
    "damage", [{"dtype": "O"}, {"tokens": 10**400}, {"train": 5}, {"train": [{"file": "a\0"}]}]
)
def test_a_manifest_that_makes_no_sense_is_written_anew(damage: dict[str, object], tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", 50)
    config = data(tmp_path / "a.jsonl")
    (folder,) = tokenize_corpus(config, TOKENIZER, tmp_path).folders
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | damage))
    notes: list[str] = []
    tokenize_corpus(config, TOKENIZER, tmp_path, on_note=notes.append)
    assert [note for note in notes if "tokenized again" in note]
    assert json.loads((folder / MANIFEST).read_text()) == manifest


def test_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path)

    def grow(_: TokenizeProgress) -> None:
        with path.open("a") as file:
            file.write("\n")

    with pytest.raises(InputError, match="changed while it was read"):
        tokenize_corpus(data(path), TOKENIZER, tmp_path, grow)
    assert nothing_looks_finished(tmp_path)


def test_disk_that_would_be_full_is_refused_and_left_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "a.jsonl")
    usage = namedtuple("usage", "total used free")
    left = iter([10**9, 10**9, 10**9])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, next(left, 1000)))
    with pytest.raises(DiskError, match="the disk is full"):
        tokenize_corpus(data(tmp_path / "a.jsonl"), TOKENIZER, tmp_path)
    assert nothing_looks_finished(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_write_that_the_disk_refuses_is_told(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", token_dtype(300))
    with Path("/dev/full").open("wb", buffering=0) as full:
        writer._file = full
        with pytest.raises(DiskError, match="the disk is full") as caught:
            writer.append([1, 2, 3])
    assert "SMOLCTL_CACHE" in caught.value.hint


def test_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl")
    (tmp_path / "tokens").write_text("a file where the folder should be")
    with pytest.raises(DiskError, match="cannot be written") as caught:
        tokenize_corpus(data(tmp_path / "a.jsonl"), TOKENIZER, tmp_path)
    assert "SMOLCTL_CACHE" in caught.value.hint


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text(STORY * 100)
    seen: list[TokenizeProgress] = []
    corpus = tokenize_corpus(data(tmp_path / "a.jsonl", tmp_path / "b.txt"), TOKENIZER, tmp_path, seen.append)
    assert len(seen) > 3
    assert seen == sorted(seen, key=lambda progress: progress.tokens)
    assert seen[-1].bytes_read == seen[-1].bytes_total == sum(p.stat().st_size for p in tmp_path.glob("?.*"))
    assert (seen[-1].documents, seen[-1].tokens) == (corpus.documents, corpus.tokens)


@given(st.data())
def test_stream_reads_any_range_across_shards(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    vocab_size = draw.draw(st.sampled_from([300, 2**16, 2**16 + 1]))
    ids = draw.draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=60))
    dtype = token_dtype(vocab_size)
    writer = ShardWriter(folder, "train", dtype, shard_bytes=draw.draw(st.integers(4, 40)))
    cut = draw.draw(st.integers(0, len(ids)))
    writer.append(ids[:cut])
    writer.append(ids[cut:])
    shards = writer.finish()
    files = [(folder / shard.file, shard.tokens) for shard in shards]
    begin = draw.draw(st.integers(0, len(ids)))
    length = draw.draw(st.integers(0, len(ids) - begin))
    stream = TokenStream(files, dtype, begin, length)
    start = draw.draw(st.integers(0, length))
    count = draw.draw(st.integers(0, length - start))
    for readable in (stream, pickle.loads(pickle.dumps(stream))):
        part = readable.read(start, count)
        assert part.dtype == np.int64
        assert part.tolist() == ids[begin + start : begin + start + count]
        assert len(readable) == length
    for bad in ((-1, 1), (0, length + 1), (length + 1, 0)):
        with pytest.raises(IndexError):
            stream.read(*bad)


def test_tokens_take_two_bytes_while_they_fit() -> None:
    assert token_dtype(2**16).itemsize == 2
    assert token_dtype(2**16 + 1).itemsize == 4


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    """A mapped file would end the process with SIGBUS."""
    path = tmp_path / "train-00000.bin"
    np.arange(100_000, dtype="<u2").tofile(path)
    stream = TokenStream([(path, 100_000)], np.dtype("<u2"), 0, 100_000)
    assert stream.read(90_000, 2).tolist() == [90_000 % 2**16, 90_001 % 2**16]
    os.truncate(path, 4096)
    assert stream.read(0, 2).tolist() == [0, 1]
    with pytest.raises(InputError, match=r"train-00000.bin: was shortened"):
        stream.read(90_000, 2)


def test_stream_opens_nothing_before_it_is_read(tmp_path: Path) -> None:
    stream = TokenStream([(tmp_path / "not there", 9)], token_dtype(9), 0, 9)
    assert len(pickle.loads(pickle.dumps(stream))) == 9
    with pytest.raises(FileNotFoundError):
        stream.read(0, 1)
