"""The page's tokenizer gives exactly the ids of the `tokenizers` library, and its text of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from smolctl.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from smolctl.errors import InputError
from smolctl.page.tokenization import page_tokenizer
from tests.support.node import run_module
from tests.support.tokenizer_kinds import default, llama2
from tests.support.tokenizer_texts import code_points, few, many
from tests.support.tokenizers import GPT4_REGEX, changed, divided_at, gpt2, source_of, tokenizer

# Reads {"tokenizers": [[tokenizer.json, options], ...], "texts": [...]} and writes, for each tokenizer, the
# ids and the decoded text of each text.
ENCODE = """
import { readFileSync } from "node:fs";
import { Tokenizer } from "./tokenizer.js";
const { tokenizers, texts } = JSON.parse(readFileSync(0, "utf8"));
for (const [json, options] of tokenizers) {
  const tokenizer = new Tokenizer(JSON.parse(json), options);
  const results = texts.map((text) => {
    const ids = tokenizer.encode(text);
    const stream = tokenizer.stream();
    return [ids, ids.map(stream.feed).join("") + stream.finish()];
  });
  console.log(JSON.stringify(results));
}
"""


def differing(given: Sequence[Tokenizer], texts: Sequence[str]) -> list[tuple[int, str]]:
    """Texts that get other ids, or decode to another text; with the tokenizer's place."""
    asked = [[ours.files().tokenizer_json, page_tokenizer(source_of(ours))] for ours in given]
    answers = run_module(ENCODE, stdin=json.dumps({"tokenizers": asked, "texts": texts})).split("\n")[:-1]
    found = []
    for number, (ours, answer) in enumerate(zip(given, answers, strict=True)):
        for text, (ids, shown) in zip(texts, json.loads(answer), strict=True):
            if tuple(ids) != ours.prompt(text).ids or shown != ours.decode(ids):
                found.append((number, text))
    return found


def qwen2() -> tokenizers.Tokenizer:
    return divided_at(GPT4_REGEX.replace("{1,3}", ""))


def divided_by(*parts: dict[str, Any]) -> tokenizers.Tokenizer:
    return changed("gpt2", pre_tokenizer={"type": "Sequence", "pretokenizers": parts})


def with_many_flags() -> tokenizers.Tokenizer:
    backend = gpt2()
    backend.add_tokens([
        AddedToken("long", rstrip=True, normalized=False), AddedToken("long hill", normalized=False),
        AddedToken("[old]", lstrip=True, normalized=False), AddedToken("twice\n", normalized=True),
        AddedToken("every", single_word=True, normalized=True), AddedToken("e\u0301", normalized=True),
        AddedToken("(*.^", special=True), AddedToken("🏽", special=True),
    ])  # fmt: skip
    return backend


def with_ends() -> tokenizers.Tokenizer:
    backend = gpt2()
    backend.add_special_tokens(["<s>", "</s>"])
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return backend


def with_visible_words(kind: str) -> Tokenizer:
    """What divides texts as a kind of `MAKERS`, and merges any byte with an "a", "1" or space behind it
    that is in the same word. Few words of other tokenizers show where they begin."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(byte, behind) for behind in "a1Ġ" for byte in alphabet]
    tokens = dict.fromkeys([*alphabet, *map("".join, merges)])
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer, backend.decoder = tokenizer(kind).pre_tokenizer, decoders.ByteLevel()
    return Tokenizer(backend)


def without_bytes() -> tokenizers.Tokenizer:
    """No token for some bytes, and none for any text at all to stand for them."""
    state = json.loads(tokenizer("gpt2").to_str())
    gone = {"a", "Ġ", "Ã", "ĥ", "1"}
    vocab = state["model"]["vocab"]
    kept = [token for token in vocab if not gone.intersection(token)]
    state["model"]["vocab"] = {token: number for number, token in enumerate(kept)}
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "".join(pair) in kept]
    state["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(state))


DIGITS = {"type": "Digits", "individual_digits": False}
PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
KNOWN: dict[str, Any] = {
    "as smolctl trains them": lambda: tokenizer("smollm"),
    "gpt2": gpt2,
    "a space before each text": lambda: gpt2(add_prefix_space=True),
    "a space before each word": lambda: divided_by(DIGITS, {**PLAIN, "add_prefix_space": True}),
    "gpt4": lambda: tokenizer("gpt4"),
    "qwen2": qwen2,
    "llama.cpp's default": default,
    "one word": lambda: divided_by({**PLAIN, "use_regex": False}),
    "whole words": lambda: changed("gpt2", model={"ignore_merges": True}),
    "NFC": lambda: changed("gpt2 and added tokens", normalizer={"type": "NFC"}),
    "added tokens": with_many_flags,
    "bos and eos": with_ends,
    "missing bytes": without_bytes,
}  # fmt: skip
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "long", "[old]", "every", "e\u0301", "(*.^"]


def test_every_known_kind_gives_the_ids_of_the_library() -> None:
    kinds = [Tokenizer(make()) for make in KNOWN.values()]
    assert not differing(kinds, few(SPECIAL))


@pytest.mark.slow
@pytest.mark.real_weights
def test_smollm2_gives_the_ids_of_the_library_for_a_large_sample(gguf_file: Path) -> None:
    assert not differing([load_tokenizer(str(gguf_file))], many(SPECIAL))


@pytest.mark.parametrize(
    "kind", [pytest.param("smollm", marks=pytest.mark.slow), pytest.param("gpt4", marks=pytest.mark.proof)]
)
def test_every_code_point_is_in_the_same_class(kind: str) -> None:
    """Where the page took a character for a letter and the library did not, it would be in another word. Only
    the characters of Python's Unicode are tried, which is older than the library's and the browser's."""
    assert not differing([with_visible_words(kind)], list(code_points()))


SPLIT = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
UNKNOWN: dict[str, tuple[Any, str]] = {
    "sentencepiece": (llama2, "SentencePiece's pieces, and the page is for byte-level BPE"),
    "another token": (lambda: changed("gpt2", model={"unk_token": "a", "vocab": {"a": 0}, "merges": []}),
                      "another token in the place of bytes"),
    "unigram": (lambda: tokenizer("t5"), "a model of the type Unigram"),
    "wordpiece": (lambda: tokenizer("bert"), "a model of the type WordPiece"),
    "fixed": (lambda: tokenizer("fixed"), "the pre-tokenizer FixedLength"),
    "regex": (lambda: divided_by(SPLIT, PLAIN),
              r"the pre-tokenizer Split with the pattern \{'Regex': 'x\+'\}"),
    "none": (lambda: changed("gpt2", pre_tokenizer=None), "a pre-tokenizer that does not end with ByteLevel"),
    "order": (lambda: divided_by(PLAIN, DIGITS),
              "a pre-tokenizer that does not end with ByteLevel"),
    "normalizer": (lambda: changed("gpt2", normalizer={"type": "Lowercase"}), "the normalizer Lowercase"),
    "decoder": (lambda: changed("gpt2", decoder=None), "a decoder other than ByteLevel"),
    "suffix": (lambda: changed("gpt2", model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_kind_is_refused_by_its_name(kind: str) -> None:
    make, part = UNKNOWN[kind]
    with pytest.raises(InputError, match=part) as refused:
        page_tokenizer(source_of(Tokenizer(make())))
    assert "--space-sdk gradio" in refused.value.hint
