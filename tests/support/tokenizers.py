"""Small tokenizers of every kind that models are published with, made with the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from smolctl.config import ModelConfig
from smolctl.data.tokenizer.bpe import train_bpe
from smolctl.data.tokenizer.tokenizer import Tokenizer as ModelTokenizer
from smolctl.sources.base import ModelSource, SourceKind

GPT4_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2
SAMPLE = [
    "a\n\nb a's  b\n a\tb 01!\n\n <|a|>\na",
    "d'll d\n\n\nd  d\r\n",
    "The river crosses every window, and the old clock watches the long hill. 12 cats!",
    "def f(x):\n    return x  # twice\n",
    "Größe 界面 und Straße",
] * 6


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """GPT-2's kind, with its words divided otherwise."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(SAMPLE, trainer)
    return backend


def gpt2(add_prefix_space: bool = False) -> Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space))


def divided_at(words: str) -> Tokenizer:
    """GPT-2's kind, with the words that a regular expression finds."""
    split = pre_tokenizers.Split(Regex(words), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(pre_tokenizers.Sequence([split, plain]))


def gpt4() -> Tokenizer:
    return divided_at(GPT4_REGEX)


def joining() -> Tokenizer:
    """Tokens of several words, as of tokenizers that do not divide a text at spaces."""
    return divided_at(r"[^.\n]+|[.\n]+")


def llama(scheme: str = "prepend") -> Tokenizer:
    """SentencePiece's BPE of Llama 1 and 2, in the forms in which it is published.

    Args:
        scheme: "prepend": the normalizer writes "▁"; "first", "always", "never": Metaspace does.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*SPECIAL, *bytes_, "▁▁"], show_progress=False
    )
    trained.train_from_iterator(SAMPLE, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [("▁", "▁"), *map(tuple, model["merges"])]
    backend = Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


def t5(split: bool = True) -> Tokenizer:
    """SentencePiece's Unigram, with an end after every text."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(SAMPLE, trainer)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return backend


def bert() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    backend.train_from_iterator(SAMPLE, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return backend


def words() -> Tokenizer:
    """Whole words, special ones among them."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(SAMPLE, trainer)
    return backend


def fixed() -> Tokenizer:
    """Words of five characters, counted from the beginning of a text."""
    backend = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.FixedLength(5), plain])
    return backend


def with_added_tokens(backend: Tokenizer) -> Tokenizer:
    """Tokens beside the vocabulary that hold spaces, eat spaces, or end in a line end."""
    backend.add_tokens(
        [
            AddedToken("long hill", normalized=False),
            AddedToken("cats!", rstrip=True, normalized=False),
            AddedToken("[old]", lstrip=True, normalized=False),
            AddedToken("twice\n", normalized=True),
            AddedToken("every", single_word=True, normalized=True),
        ]
    )
    return backend


MAKERS: Mapping[str, Any] = {
    "smollm": lambda: train_bpe(SAMPLE, 400),
    "gpt2": gpt2,
    "gpt2 with a prefix": lambda: gpt2(add_prefix_space=True),
    "gpt4": gpt4,
    "joining": joining,
    "llama": llama,
    "llama first": lambda: llama("first"),
    "llama always": lambda: llama("always"),
    "llama never": lambda: llama("never"),
    "t5": t5,
    "t5 undivided": lambda: t5(split=False),
    "bert": bert,
    "words": words,
    "fixed": fixed,
    "gpt2 and added tokens": lambda: with_added_tokens(gpt2()),
    "llama and added tokens": lambda: with_added_tokens(llama()),
    "t5 and added tokens": lambda: with_added_tokens(t5()),
}
WITHOUT_PLACES = ("t5 undivided", "fixed")  # no cut is known to be safe there


@cache
def tokenizer(kind: str) -> Tokenizer:
    """One of `MAKERS`, made once."""
    made: Tokenizer = MAKERS[kind]()
    return made


def changed(kind: str, **parts: Any) -> Tokenizer:
    """One of `MAKERS` with parts of its tokenizer.json exchanged; of "model" only those named."""
    state = json.loads(tokenizer(kind).to_str())
    state["model"] |= parts.pop("model", {})
    return Tokenizer.from_str(json.dumps(state | parts))


def source_of(ours: ModelTokenizer) -> ModelSource:
    """A model with this tokenizer."""
    config = ModelConfig(vocab_size=ours.vocab_size)
    return ModelSource(SourceKind.RUN, "runs/x", config, tokenizer_reader=ours.files)
