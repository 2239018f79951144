"""Trains a byte-level BPE on a corpus."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from smolctl.data.text.documents import utf8_size
from smolctl.durable import TOKENIZERS, cache_folder, replacing
from smolctl.errors import InputError
from smolctl.sources.huggingface.tokenizer import read_backend, read_tokenizer_json

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2, as in SmolLM2
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256  # a token for every byte
# More text hardly improves a vocabulary of this size, but takes memory.
SAMPLE_BYTES = 64 * 1024 * 1024
# Characters. Learning a merge takes time quadratic in a word's length: a word of three million characters, as
# in a base64 file, never finished.
LONGEST_WORD = 1_000
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Learn merges like SmolLM's: first split off single digits, then GPT-2's regex, then bytes.

    The result is a pure function of the texts, and kept in the cache: another run over them reads it. Memory
    is bounded: of a corpus above 64 MiB an evenly spread sample is used. So is time: longer words are cut
    into words of `LONGEST_WORD` characters.

    Args:
        texts: in parts of any length.
        vocab_size: entries including 3 special tokens and 256 bytes; fewer if there is nothing left to merge.

    Raises:
        InputError: `vocab_size` is too small, or there is no text.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"a tokenizer of {vocab_size} entries: at least {SMALLEST_VOCABULARY} are needed "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)",
            "Ask for a larger one, for example --tokenizer train:4096.",
        )
    sample = evenly_spread(texts, SAMPLE_BYTES)
    if not sample:
        raise InputError(
            "the corpus is empty: there is no text to train a tokenizer on", "Check data.source."
        )
    file = _cached(sample, vocab_size)
    with suppress(InputError):  # missing or damaged
        return read_backend(read_tokenizer_json(file), str(file))
    backend = _learn(sample, vocab_size)
    with suppress(OSError, InputError):  # without a writable cache, the next run takes two seconds more
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, concurrent=True) as partial:
            partial.write_text(backend.to_str(), encoding="utf-8")
    return backend


def _cached(sample: list[str], vocab_size: int) -> Path:
    """The cache path for the merges of exactly these texts."""
    content = hashlib.sha256(f"{tokenizers.__version__} {vocab_size}".encode())
    for text in sample:
        content.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return cache_folder() / TOKENIZERS / f"{content.hexdigest()}.json"


def _learn(sample: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_without_long_words(sample), trainer)
    return backend


def _without_long_words(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        start = 0
        for found in _LONG_WORD.finditer(text):
            yield text[start : found.end()]
            start = found.end()
        yield text[start:]


def evenly_spread(texts: Iterable[str], limit: int) -> list[str]:
    """Every text, or every 2nd, 4th, 8th ..., so that the total is at most about `limit` bytes."""
    kept: list[str] = []
    size, stride = 0, 1
    for number, text in enumerate(texts):
        if number % stride or not text:
            continue
        kept.append(text)
        size += utf8_size(text)
        while size > limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(utf8_size(text) for text in kept)
    return kept
