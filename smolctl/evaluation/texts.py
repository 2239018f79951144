"""The documents that models are compared on: none of the models may have been trained on them."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from smolctl.config.run import DataConfig
from smolctl.data.mixture import Mixture
from smolctl.data.text.corpus import open_sources, shown_name
from smolctl.data.text.documents import utf8_size
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokens.cache import OnNote
from smolctl.data.tokens.corpus import tokenize_corpus
from smolctl.data.tokens.marks import IDS
from smolctl.errors import InputError
from smolctl.sources.base import ModelSource
from smolctl.sources.huggingface.tokenizer import ids_around_text

# Of the embedded corpus, where no model says what it was trained on; nano's share.
DEFAULT = DataConfig(validation_fraction=0.02)
NAME_TEXT = "Name a text that none of them was trained on: --data FILE."


@dataclass(frozen=True)
class Text:
    """The documents that every model reads.

    Attributes:
        name: for people.
        documents: in the order of their source.
        left_out: documents that were not taken, as `limit` was reached.
        longest: bytes that long documents were cut to; None: all are whole.
    """

    name: str
    documents: tuple[str, ...]
    left_out: int = 0
    longest: int | None = None

    @property
    def bytes(self) -> int:
        return sum(map(utf8_size, self.documents))


def choose_text(
    models: Sequence[tuple[ModelSource, Tokenizer]], data: Sequence[str], limit: int, on_note: OnNote
) -> Text:
    """What `--data` names, or the documents that all runs among the models have held out.

    Where they were trained on different texts, or none is a run, it is the held-out part of the embedded
    corpus.

    Args:
        models: with their tokenizers; the recipe of a run says what it has held out.
        data: what `--data` names: files, folders, Hub datasets.
        limit: bytes of text at most; documents are chosen by their content, whatever their order.
        on_note: told what was decided, and of waiting for a tokenization.

    Raises:
        InputError: the text is missing or empty, or the runs have held out no document in common.
        HubError: a Hub dataset cannot be had.
    """
    if data:
        sources = open_sources(DataConfig(source=tuple(data)))
        texts = ("".join(one.chunks) for source in sources for one in source.read(lambda _: None))
        return _chosen(", ".join(map(shown_name, data)), texts, limit)
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
        raise InputError("the runs have held out no document in common", NAME_TEXT)
    return _chosen(f"held-out part of {name}", common, limit)


def _recipes(
    models: Sequence[tuple[ModelSource, Tokenizer]], on_note: OnNote
) -> list[tuple[DataConfig, int | None, Tokenizer]]:
    """What was held out by whom: settings, samples that the run reads, and tokenizer, each once."""
    recipes: dict[tuple[tuple[object, ...], str], tuple[DataConfig, int | None, Tokenizer]] = {}
    for source, tokenizer in models:
        if source.run is not None:
            run = source.run
            samples = run.train.steps * run.train.batch_size
            recipes.setdefault((_identity(run.data), tokenizer.sha256), (run.data, samples, tokenizer))
    identities = {identity[:-1] for identity, _ in recipes}
    if len(identities) == 1:
        return list(recipes.values())
    _, tokenizer = models[0]
    default = (DEFAULT, None, tokenizer)
    if not recipes:
        on_note("None of these models says what it was trained on: they may have seen the built-in text.")
        return [default]
    on_note("The runs were trained on different texts: the held-out part of the built-in one is taken.")
    return [default, *(one for one in recipes.values() if set(one[0].source) & set(DEFAULT.source))]


def _identity(data: DataConfig) -> tuple[object, ...]:
    """What text a run was trained on, and last how much of it was held out."""
    text = data.source, data.text_field, data.split, data.special_tokens, data.validation
    return (*text, data.validation_fraction)


def _documents(held_out: Mixture, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts of the held-out tokens."""
    begin = len(ids_around_text(tokenizer.backend)[0])
    for part in held_out.parts:
        start = 0
        for end in [*part.tokens.places_of(tokenizer.end_of_text_id).tolist(), len(part.tokens)]:
            ids = (part.tokens.read(start, end - start) & IDS).tolist()  # of a conversation all is scored
            start = end + 1
            if text := tokenizer.decode(ids[begin:]).strip("\ufffd"):  # cut where a character was in two
                yield text


def _chosen(name: str, texts: Iterable[str], limit: int) -> Text:
    """Documents of at most `limit` bytes in all: those whose digests are smallest, each once.

    Where all do not fit, long ones are cut to an eighth of the limit, so that some remain to be resampled.
    No more than the limit is held in memory.
    """
    heap: list[tuple[int, int, str]] = []  # the largest digest first
    seen: set[int] = set()
    size, left_out, longest = 0, 0, limit
    for number, whole in enumerate(texts):
        text = _beginning(whole, limit)
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        if not text or digest in seen:
            continue
        seen.add(digest)
        heapq.heappush(heap, (-digest, number, _beginning(text, longest)))
        size += utf8_size(_beginning(text, longest))
        if size > limit and longest == limit:
            longest = max(1, limit // 8)
            heap = [(key, place, _beginning(one, longest)) for key, place, one in heap]
            size = sum(utf8_size(one) for *_, one in heap)
        while size > limit and len(heap) > 1:
            size -= utf8_size(heapq.heappop(heap)[2])
            left_out += 1
    chosen = tuple(text for _, _, text in sorted(heap, key=lambda one: one[1]) if text)
    if not chosen:
        raise InputError(f"{name}: no text in it", "Name files that hold text.")
    return Text(name, chosen, left_out, longest if longest < limit else None)


def _beginning(text: str, size: int) -> str:
    """At most so many bytes of a text, in whole characters."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")
