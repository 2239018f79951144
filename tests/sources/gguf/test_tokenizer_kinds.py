"""Tokenizers of Llama's near kin: the ids of the original tokenizer.json, through a GGUF and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from smolctl.config import ModelConfig
from smolctl.sources.base import TokenizerFiles
from smolctl.sources.gguf.header import GGUFHeader
from smolctl.sources.gguf.tokenizer import read_tokenizer
from smolctl.sources.gguf.write_tokenizer import tokenizer_metadata
from tests.support import tokenizer_texts
from tests.support.tokenizer_kinds import SPECIAL, default, llama2, llama3, qwen2, split
from tests.support.tokenizers import GPT4_REGEX

KINDS: Mapping[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "llama3": (llama3, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}),
    "smollm3": (
        lambda: split(GPT4_REGEX),
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smaug-bpe"},
    ),
    "qwen2": (qwen2, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}),
    "default": (default, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default"}),
    "llama2": (llama2, {"tokenizer.ggml.model": "llama"}),
}


def original_and_read(kind: str) -> tuple[Tokenizer, Tokenizer, dict[str, Any]]:
    made = KINDS[kind][0]()
    bos = 1 if kind == "llama2" else 0
    files = TokenizerFiles(made.to_str(), None, bos, 2, None)
    metadata = tokenizer_metadata(files, ModelConfig(vocab_size=512))
    back = read_tokenizer(GGUFHeader(Path("a.gguf"), 3, metadata, ()))
    assert back is not None
    return made, Tokenizer.from_str(back.tokenizer_json), metadata


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_original(kind: str) -> None:
    original, found, metadata = original_and_read(kind)
    assert {key: metadata[key] for key in KINDS[kind][1]} == KINDS[kind][1]
    for text in tokenizer_texts.few([SPECIAL, "<think>", "<s>"]):
        ids = original.encode(text).ids
        assert found.encode(text).ids == ids, text
        assert found.decode(ids) == original.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_original_in_thousands_of_texts(kind: str) -> None:
    original, found, _ = original_and_read(kind)
    texts = tokenizer_texts.many([SPECIAL, "<think>", "<s>"])[::5]
    assert [one.ids for one in found.encode_batch(texts)] == [one.ids for one in original.encode_batch(texts)]
