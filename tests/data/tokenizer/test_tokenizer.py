"""Tokenizers: loaded, trained, streamed, saved, measured against the model."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from smolctl.config import ModelConfig
from smolctl.data.tokenizer.bpe import SMALLEST_VOCABULARY, evenly_spread
from smolctl.data.tokenizer.decoding import _BYTE_OF, TextStream
from smolctl.data.tokenizer.tokenizer import (
    DEFAULT_TOKENIZER,
    Tokenizer,
    choose_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from smolctl.errors import HubError, InputError
from smolctl.sources.base import TokenizerFiles
from tests.support.tokenizers import MAKERS
from tests.support.tokenizers import tokenizer as made

TEXTS = ["def add(a, b):\n    return a + b\n", "Größe 12345 — 界面 🎉👩‍👩‍👧!", "The cat sat on the mat. " * 9]


def texts() -> Iterator[str]:
    return iter(TEXTS)


TRAINED = train_tokenizer(texts(), 400)


def sentencepiece_like() -> Tokenizer:
    """A tokenizer of Llama 2's kind: ▁ for spaces, <0x..> for bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    vocab |= {token: index + 259 for index, token in enumerate(["▁", "a", "b", "▁a", "é", "▁▁"])}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "a"), ("▁", "▁")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, bos_token_id=1, eos_token_id=2)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_undoes_encode(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text), skip_special=False) == text


@given(st.text(st.sampled_from("aé界🎉👩‍👧 \n")))
def test_stream_shows_whole_characters_only(text: str) -> None:
    stream = TRAINED.stream()
    deltas = [stream.feed(token) for token in TRAINED.encode(text)]
    assert not any("\ufffd" in delta for delta in deltas)
    assert "".join(deltas) == text
    assert stream.finish() == ""


@pytest.mark.parametrize("tokenizer", [TRAINED, sentencepiece_like()], ids=["byte-level", "sentencepiece"])
@pytest.mark.parametrize("skip_special", [True, False])
@given(data=st.data())
def test_stream_of_any_ids_equals_their_decoding(
    tokenizer: Tokenizer, skip_special: bool, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    if tokenizer is not TRAINED:  # invalid bytes spoil their neighbours there, seen or not yet seen
        ids = [token for token in ids if not 3 + 128 <= token < 259]
    stream = tokenizer.stream(skip_special=skip_special)
    shown = "".join(map(stream.feed, ids)) + stream.finish()
    assert shown == tokenizer.decode(ids, skip_special)


def test_stream_of_byte_fallback_characters() -> None:
    tokenizer = sentencepiece_like()
    stream = tokenizer.stream()
    deltas = [stream.feed(token) for token in tokenizer.encode("a 界🎉 a")]
    assert "".join(deltas) == "a 界🎉 a"
    assert not any("\ufffd" in delta for delta in deltas)


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
def test_a_continuation_streams_as_what_it_adds_to_the_prompt(kind: str, data: st.DataObject) -> None:
    tokenizer = Tokenizer(made(kind))
    before = tokenizer.encode(data.draw(st.sampled_from(["", "the", "the river ", "Größe 界面"])))
    entries = [f"<0x{byte:02X}>" for byte in range(128, 256)]  # a byte that is no character spoils others
    some = [i for token, i in tokenizer.backend.get_vocab().items() if token not in entries]
    ids = data.draw(st.lists(st.sampled_from(some), max_size=12))
    if tokenizer._byte_level:
        ids = tokenizer.encode(tokenizer.decode(ids).replace("\ufffd", ""))
    stream = tokenizer.stream(before)
    shown = "".join(map(stream.feed, ids)) + stream.finish()
    assert tokenizer.decode(before) + shown == tokenizer.decode([*before, *ids])


def test_the_work_of_streaming_grows_with_the_text_and_no_faster() -> None:
    class Counting:
        """A backend that adds up how many ids were decoded."""

        ids = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(made("llama"), name)

        def decode(self, ids: list[int], **settings: Any) -> str:
            Counting.ids += len(ids)
            text: str = made("llama").decode(ids, **settings)
            return text

    text = "the old clock 界面 " * 100
    ids = Tokenizer(made("llama")).encode(text)
    for more in ([], [made("llama").get_vocab()["<0xFF>"]] * 500, [made("llama").get_vocab()["</s>"]] * 500):
        Counting.ids = 0
        stream = TextStream(Counting(), None, True)  # type: ignore[arg-type]
        shown = "".join(map(stream.feed, ids + more)) + stream.finish()
        assert shown.startswith(text)
        assert Counting.ids < 8 * len(ids + more)


def test_byte_alphabet_is_the_librarys() -> None:
    assert set(_BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(_BYTE_OF.values()) == list(range(256))
    for character, byte in _BYTE_OF.items():
        if byte < 128:
            assert decoders.ByteLevel().decode([character]) == chr(byte)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_lengths_add_up_to_the_text(text: str) -> None:
    lengths = TRAINED.token_byte_lengths()
    assert lengths.dtype == np.int32
    assert lengths.shape == (TRAINED.vocab_size,)
    if "<|" not in text:
        assert lengths[TRAINED.encode(text)].sum() == len(text.encode())


def test_special_tokens_stand_for_no_bytes() -> None:
    lengths = TRAINED.token_byte_lengths()
    assert lengths[[0, 1, 2]].tolist() == [0, 0, 0]
    assert (lengths[3:] > 0).all()


def test_byte_lengths_of_sentencepiece_tokens() -> None:
    tokenizer = sentencepiece_like()
    lengths = tokenizer.token_byte_lengths()
    assert lengths[tokenizer.encode("aé界")].sum() == len(" aé界".encode())  # its normalizer adds a space


def test_trained_tokenizer_has_smollms_special_tokens_and_single_digits() -> None:
    assert [TRAINED.token(index) for index in range(3)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert TRAINED.end_of_text_id == TRAINED.eos_token_id == 0
    assert len(TRAINED.encode("2024")) == 4
    assert TRAINED.encode("<|im_start|>a")[0] == 1
    assert TRAINED.vocab_size <= 400


def test_training_gives_the_same_tokenizer_in_every_process() -> None:
    code = (
        "from smolctl.config.data import DataConfig;"
        "from smolctl.data.text.corpus import iter_texts;"
        "from smolctl.data.tokenizer.tokenizer import train_tokenizer;"
        "from itertools import islice;"
        "print(train_tokenizer(islice(iter_texts(DataConfig()), 60), 600).sha256)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        for env in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "1"})
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == 64


def test_sample_is_spread_evenly_and_bounded() -> None:
    numbers = [f"{number:04}" for number in range(1000)]
    kept = evenly_spread(iter(numbers), limit=400)
    assert sum(map(len, kept)) <= 400
    gaps = {int(b) - int(a) for a, b in pairwise(kept)}
    assert len(gaps) == 1
    assert len(kept) > 50
    assert evenly_spread(iter(numbers), limit=4000) == numbers


def test_a_corpus_of_one_endless_word_teaches_a_tokenizer() -> None:
    tokenizer = train_tokenizer(iter(["ab" * 1_000_000, "the cat sat on the mat"]), 270)
    assert tokenizer.encode("abababab the")[-1] == tokenizer.encode(" the")[-1]
    assert len(tokenizer.encode("ab" * 500)) < 10


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match=f"at least {SMALLEST_VOCABULARY}"):
        train_tokenizer(texts(), 100)


def test_training_on_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        train_tokenizer(iter(["", ""]), 400)


def test_saved_tokenizer_loads_here_and_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    ours = Tokenizer(TRAINED.backend, template, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(TEXTS)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    chat = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "hi<|im_end|>"
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(str(name))
        assert again.sha256 == ours.sha256
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, 2, 2)
        assert again.chat_template == template


def test_a_saved_tokenizer_keeps_every_token_that_ends_a_text(tmp_path: Path) -> None:
    ours = Tokenizer(TRAINED.backend, eos_token_id=2, end_token_ids=(2, 7, 9))
    ours.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    config = ModelConfig(vocab_size=400, eos_token_id=2)
    assert again.eos_token_id == 2
    assert {2, 7, 9} <= ours.stop_token_ids(config) == again.stop_token_ids(config)


def test_truncation_and_padding_in_the_file_are_not_obeyed() -> None:
    backend = tokenizers.Tokenizer.from_str(TRAINED.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding()
    loaded = Tokenizer.from_files(TokenizerFiles(backend.to_str()))
    assert loaded.encode_batch(["a", "cat " * 9]) == [TRAINED.encode("a"), TRAINED.encode("cat " * 9)]
    assert loaded.sha256 == TRAINED.sha256


def test_a_name_of_no_tokenizer_leads_to_what_can_be_named(tmp_path: Path) -> None:
    for name in ("smollm", "nano"):
        with pytest.raises(InputError, match=f"{name}: no tokenizer") as caught:
            load_tokenizer(name)
        assert "train:N" in caught.value.hint
        assert "Presets" not in caught.value.hint


def test_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in ("not JSON", json.dumps({"model": 3})):
        path.write_text(content)
        with pytest.raises(InputError, match=r"tokenizer\.json") as caught:
            load_tokenizer(str(path))
        assert caught.value.hint


def test_tokenizer_without_an_end_of_text_is_named() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(InputError, match="end-of-sequence"):
        _ = Tokenizer(backend).end_of_text_id


def test_vocabulary_that_does_not_fit_names_both_numbers(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    with pytest.raises(InputError, match=rf"ids up to {TRAINED.vocab_size - 1}, .* vocab_size is 300"):
        choose_tokenizer(str(tmp_path), texts, 300, print)
    with pytest.raises(InputError, match=r"5,000 entries .* vocab_size of 4,096"):
        choose_tokenizer("train:5000", texts, 4096, print)
    with pytest.raises(InputError, match="expected train:N"):
        choose_tokenizer("train:many", texts, 4096, print)


def test_an_id_that_only_the_post_processor_writes_needs_a_row_of_the_model() -> None:
    backend = tokenizers.Tokenizer.from_str(TRAINED.backend.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|far|> $A", special_tokens=[("<|far|>", 5_000)]
    )
    with pytest.raises(InputError, match="ids up to 5,000"):
        Tokenizer(backend).require_fit(TRAINED.vocab_size)


def test_train_n_trains_on_the_corpus() -> None:
    assert choose_tokenizer("train:400", texts, 4096, print).sha256 == TRAINED.sha256


def test_unreachable_hub_trains_a_tokenizer_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    notes: list[str] = []
    chosen = choose_tokenizer(None, texts, 400, notes.append)
    assert chosen.sha256 == TRAINED.sha256
    assert len(notes) == 1
    assert DEFAULT_TOKENIZER in notes[0]
    assert "400" in notes[0]
    with pytest.raises(HubError):
        choose_tokenizer(DEFAULT_TOKENIZER, texts, 400, notes.append)


@pytest.mark.real_weights
def test_real_tokenizer_streams_what_it_decodes(gguf_file: Path) -> None:
    tokenizer = load_tokenizer(str(gguf_file))
    assert tokenizer.vocab_size == 49_152
    assert tokenizer.token(tokenizer.end_of_text_id) == "<|endoftext|>"
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(49_152) for _ in range(50)]
        stream = tokenizer.stream(skip_special=False)
        assert "".join(map(stream.feed, ids)) + stream.finish() == tokenizer.decode(ids, skip_special=False)
    text = "Größe 🎉 12345 界面\n\n\tdef f(): pass"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_byte_lengths()[tokenizer.encode(text)].sum() == len(text.encode())


def test_a_learned_tokenizer_is_kept_and_a_damaged_copy_is_learned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path))
    learned = train_tokenizer(texts(), 400)
    (kept,) = (tmp_path / "tokenizers").iterdir()
    content = kept.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("smolctl.data.tokenizer.bpe._learn", None)  # would fail if it were called
        assert train_tokenizer(texts(), 400).sha256 == learned.sha256
    kept.write_bytes(content[:100])
    assert train_tokenizer(texts(), 400).sha256 == learned.sha256
    assert kept.read_bytes() == content
    train_tokenizer(texts(), 401)
    assert len(list((tmp_path / "tokenizers").iterdir())) == 2
