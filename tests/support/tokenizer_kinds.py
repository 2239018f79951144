"""Tokenizers as Llama's near kin have them, built from their published structure with a small vocabulary."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors

from smolctl.data.tokenizer.bpe import train_bpe
from smolctl.data.tokenizer.tokenizer import Tokenizer as ModelTokenizer
from smolctl.sources.base import TokenizerFiles
from tests.support.tokenizers import GPT4_REGEX, byte_level, tokenizer

CORPUS = ["the cat sat on 12 mats and saw 345 birds; it's over trees\n\n  by the sea" for _ in range(20)]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
)
SPECIAL = "<|eot|>"


def split(*regexes: str) -> Tokenizer:
    steps = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = byte_level(pre_tokenizers.Sequence([*steps, plain]))
    made.add_special_tokens([AddedToken(SPECIAL, normalized=False)])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made


def llama3() -> Tokenizer:
    made = split(GPT4_REGEX)
    state = json.loads(made.to_str())
    # An entry that the merges do not make.
    state["model"] |= {"ignore_merges": True, "vocab": {**state["model"]["vocab"], "Ġclockwork": 402}}
    made = Tokenizer.from_str(json.dumps(state))
    bos = [("<|endoftext|>", 0)]
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=bos)
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return made


def qwen2() -> Tokenizer:
    made = split(GPT4_REGEX.replace("{1,3}", ""))
    made.normalizer = normalizers.NFC()
    return made


def default() -> Tokenizer:
    return split(
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        "[0-9][0-9][0-9]",
    )


def llama2() -> Tokenizer:
    """As transformers converts SentencePiece's: all divisions of a piece, those of the first pieces first."""
    state = json.loads(tokenizer("llama").to_str())
    vocab = state["model"]["vocab"]
    pieces = [token for token, index in sorted(vocab.items(), key=lambda one: one[1]) if index > 258]
    state["model"]["merges"] = [
        pair
        for piece in pieces
        for pair in sorted(
            (
                [piece[:at], piece[at:]]
                for at in range(1, len(piece))
                if {piece[:at], piece[at:]} <= vocab.keys()
            ),
            key=lambda pair: (vocab[pair[0]], vocab[pair[1]]),
        )
    ]
    return Tokenizer.from_str(json.dumps(state))


def trained(pre: str = "smollm", template: str | None = CHATML) -> TokenizerFiles:
    backend = train_bpe(CORPUS, 290)
    if pre == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return TokenizerFiles(ModelTokenizer(backend).backend.to_str(), template, 0, 0, 2)
