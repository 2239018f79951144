"""The tokenizer in a GGUF, converted to the text of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from smolctl.errors import InputError
from smolctl.escaping import json_text
from smolctl.outside import checked
from smolctl.sources.base import DAMAGED, TokenizerFiles
from smolctl.sources.gguf.header import GGUFHeader, as_written

# Token types of llama.cpp's vocabulary; all except the first are matched before the merges.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ALONE = {**BYTE_LEVEL, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


# As in the tokenizer.json of Llama 3 and Qwen 2: groups of at most three digits, or single digits.
LLAMA3, QWEN2 = (
    _split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
# llama.cpp's default steps for a file that does not name a pre-tokenizer.
DEFAULT = tuple(
    _split(regex)
    for regex in (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    )
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before the merges, and other properties of llama.cpp's pre-tokenizers."""

    steps: tuple[dict[str, Any], ...]  # in the format of tokenizer.json
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False  # a word that is an entry is one token, whatever the merges give
    adds_bos: bool = False  # default if the file does not say


# By tokenizer.ggml.pre. llama.cpp omits Qwen's normalizer, so it gives other ids for texts that are not NFC.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "smollm": PreTokenizer((DIGITS, BYTE_LEVEL)),
    "gpt-2": PreTokenizer((BYTE_LEVEL,)),
    "llama-bpe": PreTokenizer((LLAMA3, BYTES_ALONE), ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer((QWEN2, BYTES_ALONE), normalizer={"type": "NFC"}),
    "smaug-bpe": PreTokenizer((LLAMA3, BYTES_ALONE)),  # used by SmolLM3's files
    "default": PreTokenizer((*DEFAULT, BYTES_ALONE)),
}
OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "smollm3": "smaug-bpe"}
WORD_START = "▁"  # SentencePiece's space
MAX_PIECE = 1_000  # characters, because all divisions of a piece are tried; Llama 2's longest piece has 16
# Keys of the ids that end a text, a turn or a message.
ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
# Keys of the recommended sampling settings, by the names of generation_config.json.
RECOMMENDED = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
NO_TOKEN = (-1, 2**32 - 1)  # values with which some converters mean that there is no such token
OTHER_GGUF = "Name a tokenizer.json or a Hub id as the tokenizer instead."


def read_tokenizer(header: GGUFHeader) -> TokenizerFiles | None:
    """Read the tokenizer of a GGUF, byte-level BPE or SentencePiece; None if the file has no vocabulary.

    Raises:
        InputError: another kind of tokenizer, another pre-tokenizer, or damaged metadata.
    """
    values = header.metadata
    model = values.get("tokenizer.ggml.model")
    if model is None:
        return None
    if model not in ("gpt2", "llama"):
        raise InputError(
            f"{header.path}: tokenizer model {model} is not supported, only gpt2 and llama", OTHER_GGUF
        )
    given = values.get("tokenizer.ggml.pre", "default")
    pre = OTHER_NAMES.get(given, given) if isinstance(given, str) else "damaged"
    if model == "gpt2" and pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise InputError(f"{header.path}: pre-tokenizer {pre} is not supported, only {known}", OTHER_GGUF)
    try:
        parts = _sentence_piece(values) if model == "llama" else _byte_level(values, PRE_TOKENIZERS[pre])
        text = json_text(parts)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else error
        if isinstance(error, (AttributeError, IndexError, TypeError)):
            reason = "a value of the wrong type, or an id that no token has"
        raise InputError(f"{header.path}: the tokenizer is damaged ({reason})", DAMAGED) from None
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
    """The ids of the BOS, EOS and padding tokens, under the names of a config."""
    named = {"bos": "bos", "eos": "eos", "pad": "padding"}
    found = {
        f"{ours}_token_id": values.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in named.items()
    }
    return {name: None if value in NO_TOKEN else value for name, value in found.items()}


def _byte_level(values: Mapping[str, Any], pre: PreTokenizer) -> dict[str, Any]:
    tokens = list(values["tokenizer.ggml.tokens"])
    merges = list(values["tokenizer.ggml.merges"])  # "a b": as good as a list of two, and faster to read
    if any(merge.count(" ") != 1 for merge in merges):
        raise ValueError("a merge is not a pair")
    first, *others = pre.steps
    return _tokenizer_json(
        values,
        normalizer=pre.normalizer,
        pre_tokenizer={"type": "Sequence", "pretokenizers": list(pre.steps)} if others else first,
        post_processor=_bos_template(values, tokens, pre.adds_bos),
        decoder=BYTE_LEVEL,
        model={"ignore_merges": pre.ignore_merges, "merges": merges},
    )


def _sentence_piece(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer.json that transformers writes for Llama 2 and TinyLlama.

    SentencePiece joins the neighbours that form the piece with the highest score. The equivalent merges: all
    divisions of each piece in two, in descending order of score.
    """
    tokens, kinds = list(values["tokenizer.ggml.tokens"]), _types(values)
    scores = list(values["tokenizer.ggml.scores"])
    ids = {token: index for index, token in enumerate(tokens)}
    pieces = [index for index, kind in enumerate(kinds) if kind == NORMAL]
    if max(map(len, tokens), default=0) > MAX_PIECE:
        raise ValueError(f"a piece of more than {MAX_PIECE:,} characters")
    merges = []
    for index in sorted(pieces, key=lambda one: -scores[one]):
        token = tokens[index]
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        merges += sorted(
            ([left, right] for left, right in halves if left in ids and right in ids),
            key=lambda pair: (ids[pair[0]], ids[pair[1]]),
        )
    prefix = values.get("tokenizer.ggml.add_space_prefix", True)
    unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else None
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    words = {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "}
    first = [{"type": "Prepend", "prepend": WORD_START}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return _tokenizer_json(
        values,
        normalizer={"type": "Sequence", "normalizers": [*first, spaces]},
        pre_tokenizer=None,
        post_processor=_bos_template(values, tokens, adds_bos=True),
        decoder={"type": "Sequence", "decoders": [words, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        model={
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "merges": merges,
        },
    )


def _types(values: Mapping[str, Any]) -> list[int]:
    """llama.cpp's type of each token."""
    count = len(values["tokenizer.ggml.tokens"])
    types = list(values.get("tokenizer.ggml.token_type", (NORMAL,) * count))
    if len(types) != count:
        raise ValueError(f"{len(types)} token types for {count} tokens")
    return types


def _tokenizer_json(values: Mapping[str, Any], model: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
    tokens = list(values["tokenizer.ggml.tokens"])
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for index, kind in enumerate(_types(values))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
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
            **model,
        },
    }


def _bos_template(values: Mapping[str, Any], tokens: list[str], adds_bos: bool) -> dict[str, Any] | None:
    """Add BOS before every text if the file requests it, or if it does not say and `adds_bos`."""
    bos = values.get("tokenizer.ggml.bos_token_id")
    if not values.get("tokenizer.ggml.add_bos_token", adds_bos) or bos is None:
        return None
    special = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
    }
