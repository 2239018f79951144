"""The tokenizer in a Hugging Face folder, as plain data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from smolctl.config.model import MAX_VOCABULARY, SpecialId, TokenId
from smolctl.errors import InputError
from smolctl.escaping import json_text
from smolctl.outside import checked, checked_json, parse_object, read_file, read_json
from smolctl.sources.base import TokenizerFiles

if TYPE_CHECKING:
    import tokenizers

# Tokenizer files in formats older than tokenizer.json.
SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
SPECIAL_MAP = "special_tokens_map.json"  # names of special tokens, in older repositories
# Files copied unchanged into every export of a model, besides tokenizer.json: their settings cannot be
# rebuilt.
CARRIED = (
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    SPECIAL_MAP,
    "added_tokens.json",
)
# Sampling settings of generation_config.json.
RECOMMENDED = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# All files of a repository that a tokenizer may need, besides tokenizer.json.
SIDE_FILES = (*CARRIED, "config.json")
TOKENIZERS = ("tokenizer.json", *SLOW_FILES)
TOKENIZER_FILES = (*TOKENIZERS, "merges.txt", *SIDE_FILES)
MAX_TOKENIZER_BYTES = 100_000_000  # of a tokenizer.json; Gemma 3's has 33 million


class _AddedToken(TypedDict):
    id: TokenId
    content: str


class _Model(TypedDict):
    # A unigram model lists [token, score].
    vocab: NotRequired[
        Annotated[dict[str, TokenId] | list[tuple[str, float]], Field(union_mode="left_to_right")]
    ]


class _TokenizerJson(TypedDict):
    """The parts of a tokenizer.json that smolctl itself reads; the `tokenizers` library reads the rest."""

    model: NotRequired[_Model]
    added_tokens: NotRequired[list[_AddedToken] | None]


class _SpecialIds(TypedDict, total=False):
    """The parts that smolctl reads of a generation_config.json, and of a config.json next to a tokenizer."""

    bos_token_id: SpecialId | list[SpecialId] | None
    eos_token_id: SpecialId | list[SpecialId] | None
    pad_token_id: SpecialId | list[SpecialId] | None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder contains a tokenizer in any format."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def tokenizer_reader(folder: Path | None, carry: bool = True) -> Callable[[], TokenizerFiles | None] | None:
    """A `ModelSource.tokenizer_reader` for the tokenizer in a folder; None if there is none.

    Args:
        folder: that may hold a tokenizer.
        carry: keep the files in it for exports; a run's files are smolctl's, which an export rewrites.
    """
    if folder is None or not has_tokenizer(folder):
        return None
    return lambda: read_tokenizer_folder(folder, carry)


def read_tokenizer_folder(folder: Path, carry: bool = True) -> TokenizerFiles | None:
    """Read the tokenizer of a folder; None if there is none. Arguments as in `tokenizer_reader`.

    Raises:
        InputError: a file is damaged, or exists only in a format that cannot be converted.
    """
    if not has_tokenizer(folder):
        return None
    path = folder / "tokenizer.json"
    text = read_tokenizer_json(path) if path.is_file() else _converted(folder)
    settings, special = (_beside(folder / name) for name in ("tokenizer_config.json", SPECIAL_MAP))
    generation, model = (
        checked(_SpecialIds, _beside(folder / name), str(folder / name))
        for name in ("generation_config.json", "config.json")
    )
    given = _beside(folder / "generation_config.json")
    if "added_tokens_decoder" not in settings:  # like transformers: newer files ignore the map
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
        recommended={key: given[key] for key in RECOMMENDED if given.get(key) is not None},
        carried={name: _text(folder / name) for name in CARRIED if carry and (folder / name).is_file()},
    )


def read_tokenizer_json(path: Path) -> str:
    """The text of a tokenizer.json. Raises InputError: it cannot be read."""
    try:
        return read_file(path, most=MAX_TOKENIZER_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read ({error})", "Download the file again.") from None


def _beside(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _as_transformers_reads(text: str, settings: Mapping[str, Any], origin: str) -> str:
    """A tokenizer.json as transformers 5 loads it: if tokenizer_config.json names Llama's class, that
    class splits and joins texts in its own way (models/llama/tokenization_llama.py), whatever the file
    says.
    """
    if str(settings.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer":
        return text
    content = parse_object(text, origin)
    if "ByteLevel" in json_text({key: content.get(key) for key in ("pre_tokenizer", "decoder")}):
        return text  # like Llama 3's, which transformers does not change
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


def read_backend(tokenizer_json: str, origin: str) -> tokenizers.Tokenizer:
    """Load a tokenizer.json with the `tokenizers` library.

    Raises:
        InputError: it cannot be loaded, cannot encode a letter or unknown text, or has an impossible id.
    """
    import tokenizers

    remedy = "Fetch or save the tokenizer again."
    try:
        with _without_stderr():
            backend = tokenizers.Tokenizer.from_str(tokenizer_json)  # noqa: TID251 - here
            if getattr(backend.model, "dropout", None):  # a setting of training with random merges
                backend.model.dropout = None
            backend.decode(backend.encode("a\ufdd0").ids)
    except BaseException as error:  # the library is written in Rust, and its panics are not Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise InputError(f"{origin}: not a tokenizer.json ({error})", remedy) from None
    largest = max(backend.get_vocab().values(), default=0)
    if largest >= MAX_VOCABULARY:
        raise InputError(f"{origin}: it has the token id {largest:,}", remedy)
    return backend


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Rust writes panics to the process's standard error, independent of Python's sys.stderr."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def ids_around_text(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that transformers adds before and after every text: BOS and EOS, or none.

    Only tokenizer.json determines them: transformers 5 ignores `add_bos_token` in tokenizer_config.json.
    """
    bare, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    begin = next(n for n in range(len(full) + 1) if full[n : n + len(bare)] == bare)
    return full[:begin], full[begin + len(bare) :]


def token_ids(tokenizer_json: str, origin: str) -> Mapping[str, int]:
    """Token to id: the vocabulary of a tokenizer.json, overridden by its added tokens.

    Raises:
        InputError: it is not a tokenizer.json, or has an invalid id.
    """
    content = _checked(tokenizer_json, origin)
    vocab = content.get("model", {}).get("vocab", {})
    if isinstance(vocab, list):
        vocab = {token: index for index, (token, _) in enumerate(vocab)}
    return vocab | _added(content)


def added_token_ids(tokenizer_json: str, origin: str) -> dict[str, int]:
    """Token to id: the added tokens of a tokenizer.json. Raises as `token_ids`."""
    return _added(_checked(tokenizer_json, origin))


def _checked(tokenizer_json: str, origin: str) -> _TokenizerJson:
    return checked_json(_TokenizerJson, tokenizer_json, origin)


def _added(content: _TokenizerJson) -> dict[str, int]:
    return {token["content"]: token["id"] for token in content.get("added_tokens") or ()}


def _special_id(
    name: str, settings: Mapping[str, Any], ids: Mapping[str, int], configs: tuple[Mapping[str, Any], ...]
) -> int | None:
    """tokenizer_config.json names the token; the other files contain its id, or several."""
    token = _named_tokens(settings).get(f"{name}_token")
    if token is not None and token in ids:
        return ids[token]
    for config in configs:
        if listed := _listed(config, name):
            return listed[0]
    return None


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json, such as bos_token, by their text."""
    named = {key: settings.get(f"{key}_token") for key in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    spelled = {
        key: token.get("content") if isinstance(token, Mapping) else token for key, token in named.items()
    }
    return {f"{key}_token": token for key, token in spelled.items() if isinstance(token, str)}


def _listed(config: Mapping[str, Any], name: str = "eos") -> list[int]:
    """The ids of a special token in a config.json or generation_config.json: none, one or several."""
    value = config.get(f"{name}_token_id")
    return [
        token for token in (value if isinstance(value, list) else [value]) if token is not None and token >= 0
    ]


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template file, else the template in tokenizer_config.json; the default one of several."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _text(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _text(path: Path) -> str:
    """The text of a file, with its line ends unchanged."""
    return read_file(path).decode("utf-8", errors="replace")


def _converted(folder: Path) -> str:
    """Convert an older format to a tokenizer.json's text with transformers, using only its own code."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # whatever a converter raises, the remedy is the same
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{folder}: its tokenizer cannot be converted ({reason})", "Save it as tokenizer.json first."
        ) from None
