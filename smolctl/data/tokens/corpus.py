"""A corpus as tokens: encoded once, and cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from smolctl.config.data import DataConfig
from smolctl.data.order import MIXTURE, shares_of
from smolctl.data.text.corpus import MissingSourceError, open_sources, pin_sources, shown_name
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokens.cache import LEAST_HELD_OUT, OnNote, OnProgress, TokenizedCorpus, digest
from smolctl.data.tokens.conversations import find_conversations, tokenize_conversations
from smolctl.data.tokens.encoding import TokenizeProgress
from smolctl.data.tokens.mixture import Mixture
from smolctl.data.tokens.shards import TokenStream
from smolctl.data.tokens.streamed import tokenize_stream
from smolctl.data.tokens.whole import common_documents, find_tokenized, tokenize_whole
from smolctl.durable import cache_folder
from smolctl.errors import InputError

__all__ = ["TokenStream", "TokenizeProgress", "TokenizedCorpus", "tokenize_corpus"]

# Maximum read of a Hub dataset that is held out as a whole: more than a run scores.
HELD_OUT_SEQUENCES = 2_048


def tokenize_corpus(
    data: DataConfig,
    tokenizer: Tokenizer,
    cache: Path | None = None,
    on_progress: OnProgress | None = None,
    samples: int | None = None,
    on_note: OnNote = lambda _: None,
    folders: Sequence[str] = (),
) -> TokenizedCorpus:
    """Encode a corpus and its held-out part, or find them in the cache.

    An interrupted call leaves nothing that looks finished. If several processes call it at the same time, one
    works and the others wait for it.

    Args:
        data: sources, their weights, text field, held-out share or file.
        tokenizer: encodes the text.
        cache: folder of the results; None is `$SMOLCTL_CACHE` or `~/.cache/smolctl`.
        on_progress: called after every batch of text; an exception from it stops the work.
        samples: number of windows that the run reads in total: no more of a Hub dataset is streamed than they
            need. None streams all of it.
        on_note: called immediately with notes that the cache is damaged, or that another process is waited
            for.
        folders: names from a run's `TokenizedCorpus.folders`, used if its sources are missing.

    Raises:
        InputError: a source is missing, binary, damaged or empty; the corpus is shorter than one window; a
            Hub dataset is combined with other sources without weights.
        DiskError: the disk is full.
        HubError: a Hub dataset is not available.
    """
    cache = cache or cache_folder()
    tokenize = partial(
        _tokenize,
        tokenizer=tokenizer,
        cache=cache,
        on_progress=on_progress,
        on_note=on_note,
        folders=folders,
    )
    if data.validation is not None:
        everything = data.model_copy(update={"validation": None, "validation_fraction": 0.0})
        length = data.sequence_length
        if not data.is_chat:
            length = min(length, LEAST_HELD_OUT - 1)  # this many tokens suffice
        enough = HELD_OUT_SEQUENCES * data.sequence_length // length
        names = pin_sources([data.validation])
        (first, *_) = everything.one_by_one()
        settings = first.model_copy(update={"source": names, "sequence_length": length})
        held_out = tokenize(settings, enough)
        corpus = tokenize_corpus(everything, tokenizer, cache, on_progress, samples, on_note, folders)
        return _validated_on(corpus, held_out, names[0])
    data = data.model_copy(update={"source": pin_sources(data.source)})
    if data.weights is None:
        return tokenize(data, samples)
    shares = shares_of(data.weights)
    blocks = None if samples is None else -(-samples // MIXTURE)
    parts = [
        tokenize(one, None if blocks is None else blocks * share)
        for one, share in zip(data.one_by_one(), shares, strict=True)
    ]
    return parts[0] if len(parts) == 1 else _mixed(parts, shares, data, samples)


def _tokenize(
    data: DataConfig,
    samples: int | None,
    tokenizer: Tokenizer,
    cache: Path,
    on_progress: OnProgress | None,
    on_note: OnNote,
    folders: Sequence[str],
) -> TokenizedCorpus:
    try:
        sources = open_sources(data)
    except MissingSourceError:
        find = find_conversations if data.is_chat else find_tokenized
        if (kept := find(cache, folders, data, tokenizer)) is None:
            raise
        on_note(
            f"{', '.join(data.source)}: the file no longer exists, but its tokens are still in the cache."
        )
        return kept
    dataset = next((source.dataset for source in sources if source.dataset is not None), None)
    if data.is_chat:
        corpus = tokenize_conversations(sources, data, tokenizer, cache, on_progress, on_note)
    elif dataset is None:
        corpus = tokenize_whole(sources, data, tokenizer, cache, on_progress, on_note)
    elif len(sources) == 1:
        corpus = tokenize_stream(dataset, data, tokenizer, cache, samples, on_progress, on_note)
    else:
        raise InputError(
            f"{dataset}: a Hub dataset is streamed, so it cannot be shuffled together with other sources",
            f"Set their shares, for example data.weights={[1] * len(sources)}.",
        )
    read = [source.read_as for source in sources if source.read_as]
    return replace(corpus, read=(*read, *_reading_notes(corpus, data)))


def _validated_on(corpus: TokenizedCorpus, held_out: TokenizedCorpus, name: str) -> TokenizedCorpus:
    """A corpus with all of another one as its held-out part."""
    common = common_documents(corpus, held_out)
    seen = f"{name}: {common:,} of its documents are also trained on, which makes the score on it too good."
    return replace(
        corpus,
        folders=corpus.folders + held_out.folders,
        fingerprint=digest([corpus.fingerprint, held_out.fingerprint]),
        validation=held_out.train,
        documents=corpus.documents + held_out.documents,
        duplicates=corpus.duplicates + held_out.duplicates,
        tokens=corpus.tokens + held_out.tokens,
        bytes=corpus.bytes + held_out.bytes,
        notes=(*corpus.notes, *((seen,) if common else ())),
        read=(*corpus.read, *(f"Held out: {line}" for line in held_out.read)),
    )


def _reading_notes(corpus: TokenizedCorpus, data: DataConfig) -> Iterator[str]:
    """Notes on texts that may be read differently from what the user expects."""
    if corpus.empty:
        yield f"Empty texts, left out: {corpus.empty:,}."
    if corpus.special_tokens:
        read = {
            "text": "read as ordinary text (data.special_tokens=tokens makes them control tokens)",
            "tokens": "read as control tokens, as data.special_tokens says",
        }
        yield f"Special tokens spelled in the text: {corpus.special_tokens:,}, {read[data.special_tokens]}."


def _mixed(
    parts: list[TokenizedCorpus], shares: tuple[int, ...], data: DataConfig, samples: int | None
) -> TokenizedCorpus:
    """Combine sources of one part each into one corpus."""

    def mixture(of: list[Mixture | None]) -> Mixture:
        chosen = [(one.parts[0], share) for one, share in zip(of, shares, strict=True) if one is not None]
        return Mixture(tuple(replace(part, share=share) for part, share in chosen))

    def epochs(part: TokenizedCorpus, share: int) -> str:
        if samples is None:
            return ""
        return f", {samples * share / MIXTURE * data.sequence_length / len(part.train):.3g} epochs"

    held_out = mixture([part.validation for part in parts])
    return TokenizedCorpus(
        folders=tuple(folder for part in parts for folder in part.folders),
        fingerprint=digest([shares, [part.fingerprint for part in parts]]),
        train=mixture([part.train for part in parts]),
        validation=held_out if held_out.parts else None,
        documents=sum(part.documents for part in parts),
        duplicates=sum(part.duplicates for part in parts),
        tokens=sum(part.tokens for part in parts),
        bytes=sum(part.bytes for part in parts),
        notes=tuple(
            " ".join(
                [
                    f"{shown_name(name)}: {share / MIXTURE:.1%} of the samples{epochs(part, share)}.",
                    *part.notes,
                ]
            )
            for name, share, part in zip(data.source, shares, parts, strict=True)
        ),
        read=tuple(line for part in parts for line in part.read),
        special_tokens=sum(part.special_tokens for part in parts),
        empty=sum(part.empty for part in parts),
    )
