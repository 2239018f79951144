"""Conversations as a corpus: tokens from the cache, cut to a sequence, partly held out, and packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smolctl.config.data import DataConfig
from smolctl.data.text.conversations import Conversation, RowError
from smolctl.data.text.corpus import SequenceLengthError, Source, readable_conversations
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokenizer.turns import TurnEncoder
from smolctl.data.tokens.cache import (
    FORMAT,
    TOKENS,
    ConversationFacts,
    OnNote,
    OnProgress,
    TokenizedCorpus,
    digest,
    folder_of,
    found_or_built,
)
from smolctl.data.tokens.conversation_shards import (
    AT_ONCE,
    NAME,
    NAMED,
    ConversationManifest,
    key_of,
    read_conversation_manifest,
    read_index,
    read_tokens,
    settings_of,
    write_conversations,
)
from smolctl.data.tokens.marks import CONTEXT, IDS
from smolctl.data.tokens.mixture import Mixture, Part
from smolctl.data.tokens.packing import PackedStream
from smolctl.data.tokens.shards import TokenStream


def tokenize_conversations(
    sources: Sequence[Source],
    data: DataConfig,
    tokenizer: Tokenizer,
    cache: Path,
    on_progress: OnProgress | None,
    on_note: OnNote,
) -> TokenizedCorpus:
    """Render and encode all conversations of the sources, or find them in the cache.

    Arguments as in `tokenize_corpus`.

    Raises:
        InputError: a source is damaged, or has no conversation that can be trained on; with `data.strict`, a
            row is not one; the template does not mark the assistant's text.
    """
    encoder = TurnEncoder(tokenizer, data.loss, data.special_tokens)
    identities = [[source.name, source.identity] for source in sources]
    folder = folder_of(cache, [FORMAT, NAME, identities, settings_of(data, tokenizer)], data, tokenizer)
    manifest = found_or_built(
        folder,
        lambda on_note: read_conversation_manifest(folder, tokenizer, on_note),
        lambda: write_conversations(folder, data, sources, encoder, on_progress),
        on_note,
    )
    return _split(folder, manifest, data, tokenizer)


def find_conversations(
    cache: Path, folders: Sequence[str], data: DataConfig, tokenizer: Tokenizer
) -> TokenizedCorpus | None:
    """The tokens of missing sources, in the cache folders that a run was trained on."""
    for name in folders:
        manifest = read_conversation_manifest(cache / TOKENS / name, tokenizer, lambda _: None)
        made_from = manifest and (manifest.sources, manifest.settings)
        if manifest and made_from == (data.source, digest(settings_of(data, tokenizer))):
            return _split(cache / TOKENS / name, manifest, data, tokenizer)
    return None


def held_out_conversations(
    folder: Path, sources: Sequence[Source], data: DataConfig, tokenizer: Tokenizer
) -> Iterator[Conversation]:
    """The conversations that a run has held out, read again from its sources.

    Args:
        folder: of their tokens, from `TokenizedCorpus.folders`.
        sources: the sources of the conversations.
        data: the run's settings; for a file that is held out as a whole, all conversations are returned.
        tokenizer: the run's, with its chat template.
    """
    manifest = read_conversation_manifest(folder, tokenizer, lambda _: None)
    assert manifest is not None
    records = _records(folder, read_tokens(folder, manifest), data)
    chosen, _ = _held_out(records.keys, records.trained_tokens > 0, data.validation_fraction)
    held_out = set(records.keys[chosen].tolist())
    encoder = TurnEncoder(tokenizer, data.loss, data.special_tokens)
    rows = (one for source in sources for one in readable_conversations(source, data.shape))
    while batch := list(islice(rows, AT_ONCE)):
        for conversation, turns in zip(batch, encoder.encode(batch), strict=True):
            if not isinstance(turns, RowError) and key_of(conversation, turns) in held_out:
                yield conversation


@dataclass(frozen=True)
class _Records:
    """The index of N conversations, after those longer than a sequence were cut.

    Attributes:
        keys: (N,) see `key_of`.
        spans: (N, 2) start of each in the tokens, and number of tokens kept.
        trained_tokens: (N,) of these; 0 for dropped conversations.
        is_long: (N,) whether it is longer than a sequence.
    """

    keys: NDArray[np.uint64]
    spans: NDArray[np.int64]
    trained_tokens: NDArray[np.int64]
    is_long: NDArray[np.bool_]


def _records(folder: Path, stream: TokenStream, data: DataConfig) -> _Records:
    keys, lengths, counts = read_index(folder)
    spans = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
    size = data.sequence_length
    is_long = lengths > size
    if data.too_long == "end":
        spans[is_long, 0] += lengths[is_long] - size
    spans[is_long, 1] = size
    for number in np.flatnonzero(is_long).tolist():
        words = stream.read(*spans[number].tolist())[1:]  # the first token is never a target
        counts[number] = 0 if data.too_long == "drop" else np.count_nonzero((words & CONTEXT) == 0)
    return _Records(keys, spans, counts, is_long)


def _split(
    folder: Path, manifest: ConversationManifest, data: DataConfig, tokenizer: Tokenizer
) -> TokenizedCorpus:
    """Cut or drop conversations that are too long, hold some out, and pack both parts."""
    stream, size = read_tokens(folder, manifest), data.sequence_length
    records = _records(folder, stream, data)
    kept = records.trained_tokens > 0
    if not kept.any():
        raise SequenceLengthError(
            f"{', '.join(manifest.sources)}: every conversation is longer than a sequence of {size:,} tokens",
            "Raise data.sequence_length.",
        )
    held_out, notes = _held_out(records.keys, kept, data.validation_fraction)
    parts = [
        PackedStream(stream, records.spans[kept & part], size, tokenizer.end_of_text_id)
        for part in (~held_out, held_out)
    ]
    train, validation = (Mixture((Part(part, aligned=True),)) if len(part) > 1 else None for part in parts)
    assert train is not None
    facts = ConversationFacts(
        conversations=int(kept.sum()),
        shapes=manifest.shapes,
        trained_share=float(records.trained_tokens.sum() / records.spans[kept, 1].sum()),
        padding=1 - parts[0].filled / (len(parts[0]) - 1),
        sequences=len(parts[0].sequences),
        cut=int((records.is_long & kept).sum()),
        dropped=int((~kept).sum()),
        skipped=sum(manifest.skipped.values()),
        remarks=manifest.remarks,
        example=_example(stream.read(*records.spans[np.argmax(kept)].tolist()), tokenizer),
    )
    return TokenizedCorpus(
        folders=(folder,),
        fingerprint=digest(
            [
                NAME,
                size,
                data.too_long,
                np.flatnonzero(held_out).tolist(),
                *(s.sha256 for s in manifest.train),
            ]
        ),
        train=train,
        validation=validation,
        documents=manifest.documents,
        duplicates=manifest.duplicates,
        tokens=manifest.tokens,
        bytes=manifest.bytes,
        notes=(*_row_notes(manifest, facts, data), *notes),
        conversations=facts,
    )


def _held_out(
    keys: NDArray[np.uint64], kept: NDArray[np.bool_], fraction: float
) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Which conversations (N,) are held out: those with the lowest keys, independent of seed and order.

    So conversations with the same key are held out together.
    """
    different = np.unique(keys[kept])
    count = min(max(1, round(fraction * len(different))), len(different) // 2) if fraction else 0
    if not count:
        none = np.zeros(len(keys), dtype=bool)
        few = "All conversations are the same: there is no validation. Name a file for it: data.validation."
        return none, (few,) if fraction else ()
    return keys <= different[count - 1], ()


def _example(words: NDArray[np.int64], tokenizer: Tokenizer) -> tuple[tuple[str, bool], ...]:
    """A conversation as segments of text, and whether each is trained on."""
    is_trained = (words & CONTEXT) == 0
    edges = [0, *(np.flatnonzero(np.diff(is_trained)) + 1).tolist(), len(words)]
    runs = [(words[start:end] & IDS, bool(is_trained[start])) for start, end in pairwise(edges)]
    return tuple((tokenizer.decode(ids.tolist(), skip_special=False), trained) for ids, trained in runs)


def _row_notes(manifest: ConversationManifest, facts: ConversationFacts, data: DataConfig) -> Iterator[str]:
    """Notes on rows that are not trained on, or not completely."""
    if facts.skipped:
        reasons = sorted(manifest.skipped.items(), key=lambda item: (-item[1], item[0]))
        counted = "; ".join(f"{count:,} {reason}" for reason, count in reasons[:NAMED])
        yield (
            f"Rows skipped because they are not conversations: {facts.skipped:,} ({counted}). "
            f"First: {manifest.named[0]}."
        )
    for remark, count in manifest.remarks.items():
        yield f"{remark}: {count:,} conversation{'s' if count > 1 else ''}."
    kept = {"start": "their start", "end": "their end"}
    if facts.cut:
        yield (
            f"Conversations longer than a sequence of {data.sequence_length:,} tokens: {facts.cut:,}; "
            f"{kept[data.too_long]} is kept (data.too_long)."
        )
    if facts.dropped:
        yield f"Conversations skipped because no answer fits into a sequence: {facts.dropped:,}."
