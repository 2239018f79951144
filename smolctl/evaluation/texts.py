"""Chooses held-out documents, or answers in held-out conversations, to compare models on."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from smolctl.config.data import DataConfig
from smolctl.data.text.conversations import Conversation, shape_of
from smolctl.data.text.corpus import Source, open_sources, readable_conversations, shown_name
from smolctl.data.text.documents import utf8_size
from smolctl.data.text.python_library import NAME as PYTHON
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokens.cache import OnNote
from smolctl.data.tokens.conversations import held_out_conversations
from smolctl.data.tokens.corpus import tokenize_corpus
from smolctl.data.tokens.marks import IDS
from smolctl.data.tokens.mixture import Mixture
from smolctl.errors import InputError
from smolctl.escaping import json_text
from smolctl.sources.base import ModelSource
from smolctl.sources.huggingface.tokenizer import ids_around_text

# Of the built-in corpus, if no model records what it was trained on; the share of nano.
DEFAULT = DataConfig(validation_fraction=0.02)
D = TypeVar("D", str, Conversation)
NAME_TEXT = "Name a text that none of them was trained on: --data FILE."


@dataclass(frozen=True)
class Text:
    """The documents that every model is scored on.

    Attributes:
        name: for people.
        documents: in the order of their source; of conversations, the answers count.
        left_out: documents that were not used because `limit` was reached.
        longest: bytes to which long documents were cut; None: all are complete.
    """

    name: str
    documents: tuple[str, ...] | tuple[Conversation, ...]
    left_out: int = 0
    longest: int | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the documents are conversations."""
        return isinstance(self.documents[0], Conversation)

    @property
    def bytes(self) -> int:
        return sum(map(scored_bytes, self.documents))


def scored_bytes(document: str | Conversation) -> int:
    """Bytes of a text, or of the assistant's messages in a conversation, without what the template adds."""
    if isinstance(document, str):
        return utf8_size(document)
    return sum(utf8_size(document.messages[number]["content"]) for number in document.answers)


def choose_text(
    models: Sequence[tuple[ModelSource, Tokenizer]], data: Sequence[str], limit: int, on_note: OnNote
) -> Text:
    """The text that `--data` names, or the documents that all runs among the models have held out.

    If the runs were trained on different texts, or no model is a run, this is the held-out part of the
    built-in corpus. If some were trained on conversations, it is the conversations that these have held out.

    Args:
        models: with their tokenizers; the recipe of a run records what it held out.
        data: what `--data` names: files, folders, Hub datasets.
        limit: maximum bytes of text; documents are chosen by their content, independent of their order.
        on_note: called with decisions, and while another process tokenizes the text.

    Raises:
        InputError: the text is missing or empty, or the runs have no held-out document in common.
        HubError: a Hub dataset cannot be downloaded.
    """
    if data:
        sources = open_sources(DataConfig(source=tuple(data)))
        name = ", ".join(map(shown_name, data))
        if all(map(_has_conversations, sources)):
            return _chosen(
                name, (one for source in sources for one in readable_conversations(source, "auto")), limit
            )
        texts = ("".join(one.chunks) for source in sources for one in source.read(lambda _: None))
        return _chosen(name, texts, limit)
    if any(source.run is not None and source.run.data.is_chat for source, _ in models):
        return _held_out_conversations(models, limit, on_note)
    held_out = _recipes(models, on_note)
    names = (name for one, *_ in held_out for name in ([one.validation] if one.validation else one.source))
    name = ", ".join(dict.fromkeys(map(shown_name, names)))
    common: dict[str, None] | None = None
    for settings, samples, tokenizer in held_out:
        corpus = tokenize_corpus(settings, tokenizer, samples=samples, on_note=on_note)
        if corpus.validation is None:
            raise InputError(f"{name}: nothing was held out", NAME_TEXT)
        found = dict.fromkeys(_documents(corpus.validation, tokenizer))
        common = found if common is None else {text: None for text in common if text in found}
    if not common:
        raise InputError("the runs have no held-out document in common", NAME_TEXT)
    return _chosen(f"held-out part of {name}", common, limit)


def _has_conversations(source: Source) -> bool:
    """Whether the first row of a source has the fields of a conversation; the built-in corpus is plain
    text.
    """
    if source.name == PYTHON:
        return False
    try:
        _, row = next(source.rows(lambda _: None), ("", ""))
    except InputError:  # plain text has no rows
        return False
    return not isinstance(row, str) and shape_of(list(row)) is not None


def _held_out_conversations(
    models: Sequence[tuple[ModelSource, Tokenizer]], limit: int, on_note: OnNote
) -> Text:
    """Conversations held out by all models that were trained on conversations."""
    common: dict[str, Conversation] | None = None
    names: dict[str, None] = {}
    for source, tokenizer in models:
        if source.run is None or not source.run.data.is_chat:
            continue
        data = source.run.data
        names |= dict.fromkeys(map(shown_name, [data.validation] if data.validation else data.source))
        found = {_content(one): one for one in _held_out_of(data, tokenizer, on_note)}
        common = found if common is None else {key: one for key, one in common.items() if key in found}
    if not common:
        raise InputError("the runs have no held-out conversation in common", NAME_TEXT)
    return _chosen(f"held-out part of {', '.join(names)}", common.values(), limit)


def _held_out_of(data: DataConfig, tokenizer: Tokenizer, on_note: OnNote) -> Iterator[Conversation]:
    if data.validation is not None:
        for source in open_sources(DataConfig(source=(data.validation,))):
            yield from readable_conversations(source, data.shape)
        return
    for one in data.one_by_one() if data.weights is not None else (data,):
        (folder,) = tokenize_corpus(one, tokenizer, on_note=on_note).folders
        yield from held_out_conversations(folder, open_sources(one), one, tokenizer)


def _recipes(
    models: Sequence[tuple[ModelSource, Tokenizer]], on_note: OnNote
) -> list[tuple[DataConfig, int | None, Tokenizer]]:
    """The distinct held-out texts: settings, samples that the run reads, and tokenizer."""
    recipes: dict[tuple[tuple[object, ...], str], tuple[DataConfig, int | None, Tokenizer]] = {}
    for source, tokenizer in models:
        if source.run is not None:
            run = source.run
            recipes.setdefault((_identity(run.data), tokenizer.sha256), (run.data, run.samples, tokenizer))
    identities = {identity[:-1] for identity, _ in recipes}
    if len(identities) == 1:
        return list(recipes.values())
    _, tokenizer = models[0]
    default = (DEFAULT, None, tokenizer)
    if not recipes:
        on_note(
            "None of these models records what it was trained on, so they may have seen the built-in text."
        )
        return [default]
    on_note("The runs were trained on different texts: the held-out part of the built-in text is used.")
    return [default, *(one for one in recipes.values() if set(one[0].source) & set(DEFAULT.source))]


def _identity(data: DataConfig) -> tuple[object, ...]:
    """Identifies the text that a run was trained on; the last item is how much of it was held out."""
    text = data.source, data.text_field, data.split, data.special_tokens, data.validation
    return (*text, data.validation_fraction)


def _documents(held_out: Mixture, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts of the held-out tokens."""
    begin = len(ids_around_text(tokenizer.backend)[0])
    for part in held_out.parts:
        start = 0
        for end in [*part.tokens.places_of(tokenizer.end_of_text_id).tolist(), len(part.tokens)]:
            ids = (part.tokens.read(start, end - start) & IDS).tolist()  # scores whole conversations
            start = end + 1
            if text := tokenizer.decode(ids[begin:]).strip("\ufffd"):  # the cut may divide a character
                yield text


def _chosen(name: str, documents: Iterable[D], limit: int) -> Text:
    """Documents of at most `limit` bytes in total: those with the smallest digests, without duplicates.

    If not all documents fit, long texts are cut to an eighth of the limit, so that several remain to be
    resampled. At most `limit` bytes are held in memory.
    """
    heap: list[tuple[int, int, D]] = []  # the largest digest first
    seen: set[int] = set()
    size, left_out, longest = 0, 0, limit
    for number, whole in enumerate(documents):
        text = _beginning(whole, limit)
        digest = int.from_bytes(hashlib.blake2b(_content(text).encode(), digest_size=8).digest(), "big")
        if not scored_bytes(text) or digest in seen:
            continue
        seen.add(digest)
        heapq.heappush(heap, (-digest, number, _beginning(text, longest)))
        size += scored_bytes(_beginning(text, longest))
        if size > limit and longest == limit:
            longest = max(1, limit // 8)
            heap = [(key, place, _beginning(one, longest)) for key, place, one in heap]
            size = sum(scored_bytes(one) for *_, one in heap)
        while size > limit and len(heap) > 1:
            size -= scored_bytes(heapq.heappop(heap)[2])
            left_out += 1
    chosen = tuple(text for _, _, text in sorted(heap, key=lambda one: one[1]) if text)
    if not chosen:
        raise InputError(f"{name}: contains no text", "Name files that contain text.")
    is_cut = longest < limit and isinstance(chosen[0], str)
    return Text(name, chosen, left_out, longest if is_cut else None)


def _content(document: str | Conversation) -> str:
    """The content by which two documents are the same."""
    return document if isinstance(document, str) else json_text([document.messages, document.tools])


def _beginning(text: D, size: int) -> D:
    """At most this many bytes of a text, in whole characters; a conversation is not cut."""
    if isinstance(text, Conversation):
        return text
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")
