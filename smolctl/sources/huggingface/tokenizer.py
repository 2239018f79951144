"""The tokenizer that lies in a Hugging Face folder, as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolctl.errors import InputError
from smolctl.escaping import json_text
from smolctl.sources.base import TokenizerFiles

if TYPE_CHECKING:
    import tokenizers

# Files that hold a tokenizer in formats older than tokenizer.json.
SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
SPECIAL_MAP = "special_tokens_map.json"  # names of special tokens, in older repositories
# What goes unchanged into every export of a model, tokenizer.json aside: nothing can rebuild these settings.
CARRIED = (
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    SPECIAL_MAP,
    "added_tokens.json",
)
# Everything of a repository that a tokenizer may need, tokenizer.json aside.
SIDE_FILES = (*CARRIED, "config.json")
TOKENIZERS = ("tokenizer.json", *SLOW_FILES)
TOKENIZER_FILES = (*TOKENIZERS, "merges.txt", *SIDE_FILES)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file is missing, is no JSON, or no object.
    """
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror})", "Check the path and its rights."
        ) from None


def parse_json(text: bytes | str, origin: str) -> dict[str, Any]:
    """The object in a JSON text; raises as `read_json`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin}: not JSON ({error})", "Correct the file or download it again.") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{origin}: the top level must be a JSON object", "Correct the file or download it again."
        )
    return content


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer in any format."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def tokenizer_reader(folder: Path | None, carry: bool = True) -> Callable[[], TokenizerFiles | None] | None:
    """What `ModelSource.tokenizer_reader` is for the tokenizer in a folder; None where there is none.

    Args:
        folder: that may hold a tokenizer.
        carry: keep the files in it for exports; a run's are smolctl's own, which an export writes anew.
    """
    if folder is None or not has_tokenizer(folder):
        return None
    return lambda: read_tokenizer_folder(folder, carry)


def read_tokenizer_folder(folder: Path, carry: bool = True) -> TokenizerFiles | None:
    """The tokenizer of a folder; None when it holds none. Arguments as of `tokenizer_reader`.

    Raises:
        InputError: a file is damaged, or only a format is there that cannot be converted.
    """
    if not has_tokenizer(folder):
        return None
    path = folder / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else _converted(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})", "Download the file again.") from None
    settings, special, generation, model = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", SPECIAL_MAP, "generation_config.json", "config.json")
    )
    if "added_tokens_decoder" not in settings:  # as transformers does: newer files leave the map aside
        settings |= special
    text = _as_transformers_reads(text, settings, str(path))
    ids = token_ids(text, str(path))
    found = {name: _special_id(name, settings, ids, (generation, model)) for name in ("bos", "eos", "pad")}
    return TokenizerFiles(
        tokenizer_json=text,
        chat_template=_chat_template(folder, settings),
        bos_token_id=found["bos"],
        eos_token_id=found["eos"],
        pad_token_id=found["pad"],
        end_token_ids=tuple(sorted({*_listed(generation), *_listed(model)})),
        named_tokens=_named_tokens(settings),
        carried={name: _text(folder / name) for name in CARRIED if carry and (folder / name).is_file()},
    )


def _as_transformers_reads(text: str, settings: Mapping[str, Any], origin: str) -> str:
    """A tokenizer.json as transformers 5 takes it: where tokenizer_config.json names Llama's class, this one
    divides and joins texts its own way (models/llama/tokenization_llama.py), whatever the file says."""
    if str(settings.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer":
        return text
    content = parse_json(text, origin)
    if "ByteLevel" in json_text({key: content.get(key) for key in ("pre_tokenizer", "decoder")}):
        return text  # Llama 3's kind, which transformers leaves as it is
    prefix = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    parts: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    content |= {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": parts},
    }
    return json_text(content)


def ids_around_text(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that transformers puts before and after every text: BOS and EOS, or none.

    tokenizer.json alone decides it: transformers 5 leaves `add_bos_token` of tokenizer_config.json out.
    """
    bare, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    begin = next(n for n in range(len(full) + 1) if full[n : n + len(bare)] == bare)
    return full[:begin], full[begin + len(bare) :]


def token_ids(tokenizer_json: str, origin: str) -> Mapping[str, int]:
    """Token to id: the added tokens of a tokenizer.json over its vocabulary."""
    content = parse_json(tokenizer_json, origin)
    model = content.get("model")
    vocab = (isinstance(model, dict) and model.get("vocab")) or {}
    if isinstance(vocab, list):  # a unigram model lists [token, score]
        vocab = {entry[0]: index for index, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    return vocab | added_token_ids(content)


def added_token_ids(content: Mapping[str, Any]) -> dict[str, int]:
    """Token to id: what the content of a tokenizer.json adds to its vocabulary."""
    added = content.get("added_tokens") or ()
    return {token["content"]: token["id"] for token in added if isinstance(token, dict) and "id" in token}


def _special_id(
    name: str, settings: Mapping[str, Any], ids: Mapping[str, int], configs: tuple[Mapping[str, Any], ...]
) -> int | None:
    """tokenizer_config.json names the token; the other files give its id, or several."""
    token = _named_tokens(settings).get(f"{name}_token")
    if token is not None and token in ids:
        return ids[token]
    for config in configs:
        value = config.get(f"{name}_token_id")
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return None


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json, bos_token and the like, as they are spelled."""
    named = {key: settings.get(f"{key}_token") for key in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    spelled = {
        key: token.get("content") if isinstance(token, Mapping) else token for key, token in named.items()
    }
    return {f"{key}_token": token for key, token in spelled.items() if isinstance(token, str)}


def _listed(config: Mapping[str, Any]) -> list[int]:
    """The ids at which text ends according to a config.json or generation_config.json: one, or several."""
    value = config.get("eos_token_id")
    return [token for token in (value if isinstance(value, list) else [value]) if type(token) is int]


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template file, else the one within tokenizer_config.json; of several the default one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _text(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _text(path: Path) -> str:
    """The text of a file, its line ends as they are."""
    return path.read_bytes().decode("utf-8", errors="replace")


def _converted(folder: Path) -> str:
    """tokenizer.json's text from an older format, through transformers; its own code only."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # whatever a converter raises, the remedy is the same
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{folder}: its tokenizer cannot be converted ({reason})", "Save it as tokenizer.json first."
        ) from None
