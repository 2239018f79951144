"""The tokenizer inside a GGUF, rebuilt as the text of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smolctl.errors import InputError
from smolctl.escaping import json_text
from smolctl.outside import checked
from smolctl.sources.base import DAMAGED, TokenizerFiles
from smolctl.sources.gguf.header import GGUFHeader, as_written

CONTROL, USER_DEFINED = 3, 4  # token types of llama.cpp's vocabulary that are matched before the BPE
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
# tokenizer.ggml.pre -> how text is cut before the merges.
PRE_TOKENIZERS: Mapping[str, dict[str, Any]] = {
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]},
    "gpt-2": BYTE_LEVEL,
}
# Keys of the ids at which text ends: of a text, of a turn, of a message.
ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
# Keys of what the model's makers recommend for sampling, by the names of generation_config.json.
RECOMMENDED = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
NO_TOKEN = (-1, 2**32 - 1)  # how some converters spell that there is no such token
OTHER_GGUF = "Name a tokenizer.json or a Hub id as the tokenizer instead."


def read_tokenizer(header: GGUFHeader) -> TokenizerFiles | None:
    """The byte-level BPE of a GGUF; None when the file has no vocabulary.

    Raises:
        InputError: another kind of tokenizer, another pre-tokenizer, or damaged metadata.
    """
    values = header.metadata
    model = values.get("tokenizer.ggml.model")
    if model is None:
        return None
    if model != "gpt2":
        raise InputError(f"{header.path}: tokenizer model {model} is not supported, only gpt2", OTHER_GGUF)
    pre = values.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise InputError(f"{header.path}: pre-tokenizer {pre} is not supported, only {known}", OTHER_GGUF)
    try:
        text = json_text(_tokenizer_json(values, PRE_TOKENIZERS[pre]))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{header.path}: the tokenizer is damaged ({error})", DAMAGED) from None
    found = {
        "tokenizer_json": text,
        "chat_template": values.get("tokenizer.chat_template"),
        **special_ids(values),
        "end_token_ids": [values[key] for key in ENDS if values.get(key) not in (None, *NO_TOKEN)],
        "recommended": {name: as_written(values[key]) for key, name in RECOMMENDED.items() if key in values},
    }
    files = checked(TokenizerFiles, found, f"{header.path}: the tokenizer is damaged", DAMAGED)
    return replace(files, end_token_ids=tuple(sorted(set(files.end_token_ids))))


def special_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of the tokens that begin, end and fill up a text, by the names that a config has for them."""
    named = {"bos": "bos", "eos": "eos", "pad": "padding"}
    found = {
        f"{ours}_token_id": values.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in named.items()
    }
    return {name: None if value in NO_TOKEN else value for name, value in found.items()}


def _tokenizer_json(values: Mapping[str, Any], pre_tokenizer: dict[str, Any]) -> dict[str, Any]:
    tokens = list(values["tokenizer.ggml.tokens"])
    merges = list(values["tokenizer.ggml.merges"])  # "a b": read faster than a list of two, and as well
    if any(merge.count(" ") != 1 for merge in merges):
        raise ValueError("a merge is no pair")
    types = values.get("tokenizer.ggml.token_type") or (1,) * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"{len(types)} token types for {len(tokens)} tokens")
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for index, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _bos_template(values, tokens),
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _bos_template(values: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """Put the first token before every text where the file asks for it."""
    bos = values.get("tokenizer.ggml.bos_token_id")
    if not values.get("tokenizer.ggml.add_bos_token") or bos is None:
        return None
    special = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
    }
