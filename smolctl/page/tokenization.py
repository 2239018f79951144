"""The tokenizers that the page supports, and the data that tokenizer.js needs besides tokenizer.json.

The page supports byte-level BPE. Features that it does not implement exactly like the `tokenizers` library
are refused here by name, so that a visitor's text always gets the same ids as in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import pre_tokenizers

from smolctl.data.tokenizer.decoding import is_byte_level
from smolctl.data.tokenizer.prompt import is_control
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError
from smolctl.outside import shown
from smolctl.sources import ModelSource
from smolctl.sources.huggingface.tokenizer import added_token_ids, ids_around_text

# Division of texts into words: regular expressions of the library, and the JavaScript expressions with the
# flags g and u that find the same words. Every character of a text is in one of the words. The words are the
# same for the characters of Unicode 16, as far as a browser supports them, because each browser has its own
# tables.
_CONTRACTIONS = "'[sS\u017f]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"  # U+017F is a small long s
_WORDS = {
    # GPT-2, SmolLM, SmolLM2: `byte_level.rs` of the library.
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+"
        r"|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+"
    ),
    # GPT-4, Llama 3, SmolLM3: at most three digits; Qwen 2 and 3: one.
    **{
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+": (
            _CONTRACTIONS
            + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
            + digits
            + r"| ?[^\p{White_Space}\p{L}\p{N}]+[\r\n]*"
            r"|\p{White_Space}*[\r\n]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+"
        )
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    },
}
_GPT2 = next(iter(_WORDS))
# llama.cpp's default applies four regular expressions, one after the other. Text that an expression does not
# match is a word too: after GPT-2's words, its last alternative would match that text, so it is left out.
_WORDS |= {
    r"[\p{P}\$\+<=>\^~\|]+": r"[\p{P}$+<=>\^~\|]+|[^\p{P}$+<=>\^~\|]+",
    _GPT2.removesuffix(r"|\s+"): _WORDS[_GPT2],
    r"\p{N}+": r"\p{N}+|\P{N}+",
    "[0-9][0-9][0-9]": "[0-9]{3}|(?:(?![0-9]{3})[^])+",
}


def page_tokenizer(source: ModelSource) -> dict[str, Any]:
    """`tokenizer` of page.json: the ids that end an answer, and the data for tokenizer.js.

    Raises:
        InputError: the page would not give the same ids; names the unsupported part of the tokenizer.
    """
    files = source.require_tokenizer()
    tokenizer = Tokenizer.from_files(files, source.id)
    backend = tokenizer.backend
    state = json.loads(backend.to_str())  # noqa: TID251 - the library's own
    added = backend.get_added_tokens_decoder()
    lacking = next(_lacking(state), None)
    if lacking is None and not is_byte_level(backend):
        lacking = "a decoder other than ByteLevel"
    numbered = added_token_ids(files.tokenizer_json, source.id)
    if lacking is None and {token.content: number for number, token in added.items()} != numbered:
        lacking = "added tokens whose ids are not those of its vocabulary"
    if lacking:
        raise InputError(
            f"{source.id}: the page cannot reproduce this model's tokenizer, which has {lacking}",
            "Publish it with --space-sdk gradio, whose server runs every tokenizer.",
        )
    begin, end = ids_around_text(backend)
    return {
        "ends": sorted(tokenizer.stop_token_ids(source.require_config())),
        "begin": begin,
        "end": end,
        "empty": [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id],
        "normalizer": "NFC" if _parts(state["normalizer"], "normalizers") else None,
        "steps": [_step(part) for part in _parts(state["pre_tokenizer"], "pretokenizers")],
        "control": [token.content for token in added.values() if token.content and is_control(token)],
    }


def _parts(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The parts of a sequence, which may contain sequences; anything else is a single part."""
    if part is None:
        return []
    return (
        [one for inner in part[key] for one in _parts(inner, key)] if part["type"] == "Sequence" else [part]
    )


def _lacking(state: Mapping[str, Any]) -> Iterator[str]:
    """Parts of a tokenizer.json that the page does not support."""
    model = state["model"]
    if model["type"] != "BPE":
        yield f"a model of the type {model['type']}"
        return
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model[key]:
            yield key
    if model["byte_fallback"] and any(
        part["type"] == "Replace" for part in _parts(state["normalizer"], "normalizers")
    ):
        yield "SentencePiece's pieces, and the page is for byte-level BPE"
    every_byte = all(character in model["vocab"] for character in pre_tokenizers.ByteLevel.alphabet())
    if not every_byte and (model["unk_token"] is not None or model["byte_fallback"]):
        yield "another token in the place of bytes that have none"
    for part in _parts(state["normalizer"], "normalizers"):
        if part["type"] != "NFC":
            yield f"the normalizer {part['type']}"
    division = _parts(state["pre_tokenizer"], "pretokenizers")
    for part in division:
        if _step(part) is None:
            pattern = f" with the pattern {shown(part['pattern'])}" if "pattern" in part else ""
            yield f"the pre-tokenizer {part['type']}{pattern}"
    # It writes bytes as other characters, which no later part may split.
    if [part["type"] == "ByteLevel" for part in division] != [False] * (len(division) - 1) + [True]:
        yield "a pre-tokenizer that does not end with ByteLevel"


def _step(part: Mapping[str, Any]) -> dict[str, Any] | None:
    """A pre-tokenizer in the form of tokenizer.js; None if the page does not support it."""
    prefix, words = False, None
    match part:
        case {"type": "Digits", "individual_digits": individual}:
            words = r"\p{N}|\P{N}+" if individual else r"\p{N}+|\P{N}+"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            if (words := _WORDS.get(regex)) is None:
                return None
        case {"type": "ByteLevel", "add_prefix_space": prefix, "use_regex": divides}:
            words = _WORDS[_GPT2] if divides else None
        case _:
            return None
    return {"prefix": prefix, "words": words}
