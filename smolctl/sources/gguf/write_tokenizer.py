"""Converts a tokenizer to the keys of a GGUF, and checks that it still is the same tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smolctl.config import ModelConfig
from smolctl.errors import InputError, SmolError
from smolctl.outside import parse_object
from smolctl.sources.base import TokenizerFiles
from smolctl.sources.gguf.tokenizer import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    RECOMMENDED,
    UNKNOWN,
    USER_DEFINED,
    WORD_START,
)
from smolctl.sources.huggingface.tokenizer import ids_around_text, read_backend, token_ids

UNUSED, BYTE = 5, 6  # token types of llama.cpp's vocabulary
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# Texts on which tokenizers with equal entries may differ: digits, contractions, spaces, line ends, scripts,
# combining marks, special tokens within a text.
SAMPLES = (
    "In 2026 they'll sell 1,234.5 of them; we've 12345 left.",
    "def f(x):\n    return  x**2  # twice   as much\n\n\n\treturn\r\n",
    "Grüße, naïve café — ½ ²³ Ⅻ; \u00a0\u2003 Привет, мир! 你好 こんにちは 🙂👩‍👩‍👧",
    "<|endoftext|>a<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n  ",
    "HTTPServer_v2.parse('x')?!... 'tis I'M don't   ",
)
REMEDY = "Leave out the GGUF, or train with --tokenizer train:N."


def tokenizer_metadata(files: TokenizerFiles, config: ModelConfig) -> dict[str, Any]:
    """The `tokenizer.*` keys.

    The vocabulary is padded to the rows of the model's table, because llama.cpp requires one entry per row.

    Raises:
        InputError: llama.cpp has no equivalent tokenizer.
    """
    content = parse_object(files.tokenizer_json, "tokenizer.json")
    pieces = is_sentence_piece(content)
    names = {token_id: token for token, token_id in token_ids(files.tokenizer_json, "tokenizer.json").items()}
    if names and max(names) >= config.vocab_size:
        raise InputError(
            f"the tokenizer has ids up to {max(names):,}, the model's vocab_size is {config.vocab_size:,}",
            "Give the model the tokenizer that it was trained with.",
        )
    kinds = _kinds(content, names, pieces)
    rows = range(config.vocab_size)
    joins = (
        {"tokenizer.ggml.scores": _scores(content, [names.get(row, "") for row in rows])}
        if pieces
        else {"tokenizer.ggml.merges": _merges(content)}
    )
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",  # llama.cpp's names
        "tokenizer.ggml.pre": "default" if pieces else pre_tokenizer_name(content),
        "tokenizer.ggml.tokens": [names.get(row, f"[PAD{row}]") for row in rows],
        "tokenizer.ggml.token_type": [kinds.get(row, NORMAL) if row in names else UNUSED for row in rows],
        **joins,
        "tokenizer.ggml.add_space_prefix": pieces and _begins_with_space(content),
        "tokenizer.ggml.add_bos_token": _begins_with_bos(files),
    }
    ids = _special_ids(files, config)
    metadata |= {f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items() if value is not None}
    if files.chat_template:
        metadata["tokenizer.chat_template"] = files.chat_template
    return metadata | _recommended(files.recommended)


def _kinds(content: Mapping[str, Any], names: Mapping[int, str], pieces: bool) -> dict[int, int]:
    """Types of the tokens that are not `NORMAL`, by id."""
    kinds = {
        token["id"]: CONTROL if token.get("special") else USER_DEFINED
        for token in content.get("added_tokens") or ()
    }
    if pieces:
        kinds |= {row: BYTE for row, name in names.items() if BYTE_TOKEN.fullmatch(name)}
        kinds |= {row: UNKNOWN for row, name in names.items() if name == content["model"].get("unk_token")}
    return kinds


def _special_ids(files: TokenizerFiles, config: ModelConfig) -> dict[str, int | None]:
    """llama.cpp's names of the special tokens, and their ids."""
    eos = files.eos_token_id
    ids = {
        "bos": files.bos_token_id if files.bos_token_id is not None else config.bos_token_id,
        "eos": eos if eos is not None else next(iter(config.eos_token_ids), None),
        "padding": files.pad_token_id if files.pad_token_id is not None else config.pad_token_id,
    }
    # End tokens other than `eos`: llama.cpp has two more keys for them.
    others = (end for end in files.end_token_ids if end != ids["eos"])
    return ids | dict(zip(("eot", "eom"), others, strict=False))


def _recommended(found: Mapping[str, Any]) -> dict[str, Any]:
    """The recommended sampling settings under llama.cpp's keys."""
    if found.get("do_sample") is False:  # equivalent to temperature 0
        found = {**found, "temperature": 0.0}
    given = {key: found[name] for key, name in RECOMMENDED.items() if name in found}
    usable = {key: one for key, one in given.items() if type(one) in (int, float) and 0 <= one < 2**31}
    return {key: int(one) if key.endswith("top_k") else float(one) for key, one in usable.items()}


def pre_tokenizer_name(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way in which a tokenizer.json splits text before the merges.

    Raises:
        InputError: there is no such name.
    """
    model = content.get("model") or {}
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise _unsupported("no byte-level BPE")
    steps = [_kind(step) for step in _parts(content.get("pre_tokenizer"), "pretokenizers")]
    alike = {
        name: pre for name, pre in PRE_TOKENIZERS.items() if [_kind(step) for step in pre.steps] == steps
    }
    if not alike:
        raise _unsupported(f"the pre-tokenizer {', '.join(str(step[0]) for step in steps) or None}")
    normalizers = [part.get("type") for part in _parts(content.get("normalizer"), "normalizers")]
    for name, pre in alike.items():
        same = normalizers == ([pre.normalizer["type"]] if pre.normalizer else [])
        if same and bool(model.get("ignore_merges")) == pre.ignore_merges:
            return name
    raise _unsupported(f"the normalizer {normalizers[0]}" if normalizers else "ignore_merges")


def _parts(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The parts of a sequence, or the only part."""
    if not part:
        return []
    return list(part.get(key, [])) if part.get("type") == "Sequence" else [part]


def _kind(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """The behaviour of a pre-tokenizer, without its offsets, which do not affect tokens."""
    match step:
        case {"type": "ByteLevel"}:
            return "ByteLevel", bool(step.get("add_prefix_space")), step.get("use_regex", True)
        case {"type": "Digits"}:
            return "Digits", step.get("individual_digits")
        case {"type": "Split"}:
            return "Split", step.get("pattern"), step.get("behavior"), step.get("invert")
    return (step.get("type"),)


def is_sentence_piece(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is SentencePiece's BPE as transformers writes it for Llama 2 and TinyLlama."""
    model = content.get("model") or {}
    spaces = [part.get("content") for part in _parts(content.get("normalizer"), "normalizers")][-1:]
    fallback = model.get("byte_fallback") and not content.get("pre_tokenizer")
    return model.get("type", "BPE") == "BPE" and bool(fallback) and spaces == [WORD_START]


def _begins_with_space(content: Mapping[str, Any]) -> bool:
    return _parts(content.get("normalizer"), "normalizers")[0].get("type") == "Prepend"


def _scores(content: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """llama.cpp's replacement for merges: the earlier a piece is merged, the higher its score."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(content)):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def require_same_tokenizer(
    given: TokenizerFiles, back: TokenizerFiles, differs: Callable[[str], SmolError]
) -> None:
    """Check that two tokenizers give the same ids for the same texts, and have the same template.

    Raises:
        SmolError: `differs`, called with the first difference.
    """
    one, two = (read_backend(files.tokenizer_json, "tokenizer.json") for files in (given, back))
    for sample in SAMPLES:
        for special in (False, True):
            expected, found = (one_.encode(sample, add_special_tokens=special).ids for one_ in (one, two))
            if expected != found:
                raise differs(f"the tokenizer reads {sample[:30]!r} as {found[:8]}, not as {expected[:8]}")
    if (given.chat_template or None) != back.chat_template:
        raise differs("the chat template differs")


def _merges(content: Mapping[str, Any]) -> list[str]:
    """Both forms of tokenizer.json, "a b" and ["a", "b"], as GGUF's "a b".

    Raises:
        InputError: there are none; llama.cpp cannot load such a tokenizer.
    """
    merges = (content.get("model") or {}).get("merges") or ()
    if not merges:
        raise _unsupported("no merges")
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _begins_with_bos(files: TokenizerFiles) -> bool:
    """Whether the tokenizer adds BOS before every text.

    Raises:
        InputError: it adds something else.
    """
    around = ids_around_text(read_backend(files.tokenizer_json, "tokenizer.json"))
    if around == ([], []):
        return False
    if around == ([files.bos_token_id], []):
        return True
    raise _unsupported(f"special tokens around every text ({around})")


def _unsupported(what: str) -> InputError:
    return InputError(f"this tokenizer cannot go into a GGUF: it has {what}", REMEDY)
