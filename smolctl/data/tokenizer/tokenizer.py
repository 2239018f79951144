"""Text to token ids and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from smolctl.config import ModelConfig
from smolctl.config.model import MAX_VOCABULARY
from smolctl.data.tokenizer.bpe import train_bpe
from smolctl.data.tokenizer.decoding import TextStream, bytes_of_token, is_byte_level
from smolctl.data.tokenizer.prompt import Prompt, SpecialTokens, SpelledTokens
from smolctl.durable import named_path, write_json
from smolctl.errors import HubError, InputError, PromptTooLongError
from smolctl.escaping import whole_characters
from smolctl.outside import shown
from smolctl.sources import open_source
from smolctl.sources.base import TokenizerFiles
from smolctl.sources.huggingface.tokenizer import (
    has_tokenizer,
    ids_around_text,
    read_backend,
    read_tokenizer_folder,
    read_tokenizer_json,
)
from smolctl.sources.huggingface.write import GENERATION, generation_config, write_tokenizer
from smolctl.sources.stops import END_TOKENS, stop_token_ids

DEFAULT_TOKENIZER = "HuggingFaceTB/SmolLM2-135M"
END_OF_TEXT = "<|endoftext|>"
KINDS = "Name a tokenizer.json, a folder, a GGUF, a run or a Hub id; train:N trains one with N entries."


class Tokenizer:
    """A tokenizer with the information that training and sampling need.

    Args:
        backend: the `tokenizers` object; its truncation and padding are switched off.
        chat_template: Jinja source, if the model has one.
        bos_token_id: starts a text; None if unknown.
        eos_token_id: ends a text; default: `<|endoftext|>`, if it exists.
        pad_token_id: pads a batch; None if unknown.
        end_token_ids: other ids that end a text.
        named_tokens: special tokens under the names that chat templates use, such as bos_token; None: derived
            from the ids above.
        origin: of the tokenizer, for error messages.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        end_token_ids: Iterable[int] = (),
        named_tokens: Mapping[str, str] | None = None,
        origin: str = "the model",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        self.bos_token_id = bos_token_id
        self.eos_token_id = backend.token_to_id(END_OF_TEXT) if eos_token_id is None else eos_token_id
        self.pad_token_id = pad_token_id
        named = self.eos_token_id, backend.token_to_id(END_OF_TEXT)
        self._end_token_ids = {*end_token_ids, *(token_id for token_id in named if token_id is not None)}
        self._named_tokens = named_tokens
        self._origin = origin

    @staticmethod
    def from_files(files: TokenizerFiles, origin: str = "tokenizer.json") -> Tokenizer:
        """Create it from plain data.

        Raises:
            InputError: this is not a tokenizer.json; names `origin`.
        """
        backend = read_backend(files.tokenizer_json, origin)
        ids = files.bos_token_id, files.eos_token_id, files.pad_token_id
        return Tokenizer(backend, files.chat_template, *ids, files.end_token_ids, files.named_tokens, origin)

    def encode(self, text: str) -> list[int]:
        """Ids of a text like `tokenizer(text)` of transformers: with the tokens added around every text,
        such as BOS, and with special tokens spelled in the text.
        """
        ids: list[int] = self.backend.encode(text).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores; for each as `encode`."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts))]

    def prompt(self, text: str) -> Prompt:
        """A text to continue; for an empty text, the token that starts a text, if there is one."""
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        text = whole_characters(text)
        return Prompt(text, tuple(self.encode(text) or begin))

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: SpecialTokens = "text",
        context: int | None = None,
    ) -> Prompt:
        """A conversation in the chat template, ready for its answer, like `apply_chat_template` of
        transformers.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            special_tokens: how special tokens spelled in a message, such as `<|im_end|>`, are read: as "text"
                or as "tokens". Those that the template writes are always tokens.
            context: maximum tokens; a template that outputs more text than they can spell is stopped. None:
                unlimited.

        Raises:
            InputError: there is no chat template, or it refuses the messages.
            PromptTooLongError: the conversation cannot fit the context.
        """
        from smolctl.data.tokenizer.chat import render_chat  # Jinja: not for plain text
        from smolctl.templates import MOST_CHARACTERS

        if self.chat_template is None:
            raise InputError(
                "there is no chat template", "Complete plain text, or choose an instruction-tuned model."
            )
        if special_tokens == "text":
            messages = self.spelled.hide(list(messages))
        most = MOST_CHARACTERS if context is None else self.most_characters(context)
        named, origin = self.named_tokens, self._origin
        rendered = render_chat(self.chat_template, messages, named, origin=origin, most=most)
        return Prompt(self.spelled.show(rendered), tuple(self.spelled.encode(rendered)))

    def most_characters(self, tokens: int) -> int:
        """The maximum number of characters that this many tokens can spell."""
        return tokens * self._extent[1]

    def require_room(self, characters: int, context: int) -> None:
        """Refuse a prompt that is too long for a context by its length alone, before it is tokenized.

        Raises:
            PromptTooLongError: it has more characters than this many tokens can spell.
        """
        if characters <= context:  # the usual case: every token spells at least one character
            return
        most = self.most_characters(context)
        if characters > most:
            raise PromptTooLongError(
                f"the prompt has {characters:,} characters, but the model's context of {context:,} tokens "
                f"holds {most:,} at most",
                "Shorten the prompt.",
            )

    @cached_property
    def spelled(self) -> SpelledTokens:
        """The encoder for texts in which messages spell special tokens."""
        return SpelledTokens(self.backend)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids; invalid UTF-8 becomes U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def stream(self, before: Sequence[int] = (), skip_special: bool = True) -> TextStream:
        """An incremental decoder, which never returns part of a character.

        Args:
            before: ids of the prompt that is continued.
            skip_special: whether special tokens are left out.
        """
        bytes_of = self.bytes_of if self._byte_level else None
        return TextStream(self.backend, bytes_of, skip_special, before)

    @property
    def vocab_size(self) -> int:
        """Rows that a model's token table needs: the largest id plus one."""
        return self._extent[0]

    @cached_property
    def _extent(self) -> tuple[int, int]:
        """The largest id plus one, and the characters of the longest token."""
        vocabulary: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        begin, end = ids_around_text(self.backend)  # which the file may give any number
        largest = max(*vocabulary.values(), *begin, *end, -1)
        return largest + 1, max(map(len, vocabulary), default=0)

    def token(self, token_id: int | None) -> str | None:
        """The text of an id's token; None if there is no such id."""
        spelled: str | None = None if token_id is None else self.backend.id_to_token(token_id)
        return spelled

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """Special tokens under the names that chat templates use."""
        if self._named_tokens is not None:
            return self._named_tokens
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id, "pad_token": self.pad_token_id}
        spelled = {name: self.token(token_id) for name, token_id in ids.items()}
        return {name: token for name, token in spelled.items() if token is not None}

    @property
    def end_of_text_id(self) -> int:
        """The id between two documents: `<|endoftext|>`, or the end-of-sequence token.

        Raises:
            InputError: the tokenizer has neither.
        """
        named: int | None = self.backend.token_to_id(END_OF_TEXT)
        found = self.eos_token_id if named is None else named
        if found is None:
            raise InputError(
                f"the tokenizer has neither {END_OF_TEXT} nor an end-of-sequence token",
                "Name its eos_token in tokenizer_config.json, or train one with --tokenizer train:N.",
            )
        return found

    @property
    def end_tokens(self) -> frozenset[str]:
        """The text of every token that ends an answer; `stop_token_ids` includes the model's own."""
        added = (token.content for token in self.backend.get_added_tokens_decoder().values())
        named = filter(None, map(self.token, self._end_token_ids))
        return frozenset(named).union(END_TOKENS.intersection(added))

    def stop_token_ids(self, config: ModelConfig) -> frozenset[int]:
        """All ids that end an answer of a model with this tokenizer."""
        added = self.backend.get_added_tokens_decoder()
        spelled = {token_id: token.content for token_id, token in added.items()}
        return stop_token_ids(config, self._end_token_ids, spelled)

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokenizer.json in canonical form: equal for equivalent tokenizers."""
        canonical = json.dumps(json.loads(self.backend.to_str()), sort_keys=True, separators=(",", ":"))  # noqa: TID251
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def _byte_level(self) -> bool:
        return is_byte_level(self.backend)

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of an id, for a special token its name; None if there is no such id."""
        token = self.token(token_id)
        return None if token is None else bytes_of_token(token, self._byte_level)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every id; none for ids without a token."""
        return [self.bytes_of(token_id) or b"" for token_id in range(self.vocab_size)]

    def token_byte_lengths(self) -> NDArray[np.int32]:
        """Bytes of text of every id, 0 for special tokens: (vocab_size,), for bits per byte."""
        lengths = np.array([len(spelled) for spelled in self.token_bytes], dtype=np.int32)
        for token_id, token in self.backend.get_added_tokens_decoder().items():
            lengths[token_id] = 0 if token.special else len(token.content.encode())
        return lengths

    def require_fit(self, vocab_size: int) -> None:
        """Check that a model has a row for every id.

        Raises:
            InputError: it does not; names both numbers.
        """
        if self.vocab_size > vocab_size:
            raise InputError(
                f"the tokenizer has ids up to {self.vocab_size - 1:,}, "
                f"the model's vocab_size is {vocab_size:,}",
                "Use the model's own tokenizer; for a new model set "
                f"model.vocab_size={self.vocab_size}, or take --tokenizer train:{vocab_size}.",
            )

    def files(self) -> TokenizerFiles:
        """The tokenizer as plain data, which `from_files` reads."""
        ids = self.bos_token_id, self.eos_token_id, self.pad_token_id
        ends = tuple(sorted(self._end_token_ids))
        return TokenizerFiles(self.backend.to_str(), self.chat_template, *ids, ends, dict(self.named_tokens))

    def save(self, folder: Path) -> None:
        """Write the files that transformers' AutoTokenizer loads, including the generation config's end
        tokens.
        """
        files = self.files()
        write_tokenizer(folder, files)
        write_json(folder / GENERATION, generation_config(None, files))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer with this name; arguments and errors as in `read_tokenizer_of`."""
    return Tokenizer.from_files(read_tokenizer_of(name), name)


def read_tokenizer_of(name: str) -> TokenizerFiles:
    """The files of the tokenizer in a tokenizer.json, a folder, a GGUF, a run or a Hub repository.

    Raises:
        InputError: it does not exist, has no tokenizer, or is damaged.
        HubError: the Hub did not provide it.
    """
    path = named_path(name)
    files: TokenizerFiles | None
    if path.name == "tokenizer.json" and path.is_file():
        files = read_tokenizer_folder(path.parent)
    elif path.is_file() and path.suffix == ".json":
        files = TokenizerFiles(read_tokenizer_json(path))
    elif path.is_dir() and has_tokenizer(path):
        files = read_tokenizer_folder(path)
    elif "/" not in name and not path.exists():  # for a MODEL the presets would be listed
        raise InputError(f"{name}: no tokenizer has this name", KINDS)
    else:
        files = open_source(name).read_tokenizer()
    if files is None:
        raise InputError(f"{name}: contains no tokenizer", KINDS)
    return files


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries learned from texts. See `train_bpe`."""
    return Tokenizer(train_bpe(texts, vocab_size), bos_token_id=0, eos_token_id=0, pad_token_id=2)


def choose_tokenizer(
    name: str | None,
    texts: Callable[[], Iterator[str]],
    vocab_size: int,
    on_note: Callable[[str], None],
) -> Tokenizer:
    """Choose the tokenizer of a run.

    Args:
        name: as for `load_tokenizer`, or `train:N`; None for SmolLM2's, or a newly trained one if the Hub
            cannot be reached.
        texts: the corpus for training, called only if needed.
        vocab_size: rows of the model's token table.
        on_note: called with decisions.

    Raises:
        InputError: the tokenizer does not fit the model, or cannot be loaded.
    """
    if name is not None and name.startswith("train:"):
        entries = _entries(name, vocab_size)
        on_note(f"Training a tokenizer of {entries:,} entries on the corpus.")
        return train_tokenizer(texts(), entries)
    try:
        tokenizer = load_tokenizer(DEFAULT_TOKENIZER if name is None else name)
    except HubError as error:
        if name is not None:
            raise
        on_note(
            f"No tokenizer was named and the default is not available ({error.message}): "
            f"training one of {vocab_size:,} entries on the corpus."
        )
        tokenizer = train_tokenizer(texts(), vocab_size)
    tokenizer.require_fit(vocab_size)
    return tokenizer


def _entries(name: str, vocab_size: int) -> int:
    digits = name.removeprefix("train:").replace("_", "")
    if not digits.isdecimal() or len(digits) > len(str(MAX_VOCABULARY)):
        raise InputError(f"tokenizer {shown(name)}: expected train:N", "For example train:4096.")
    if int(digits) > vocab_size:
        raise InputError(
            f"tokenizer {name}: {int(digits):,} entries do not fit the model's vocab_size of {vocab_size:,}",
            f"Set model.vocab_size={int(digits)}, or ask for train:{vocab_size}.",
        )
    return int(digits)
