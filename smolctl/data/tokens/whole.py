"""Sources whose size is known, tokenized to their end: files, folders and the embedded corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smolctl.config.run import DataConfig
from smolctl.data.mixture import Mixture, Part
from smolctl.data.text.corpus import Source, open_sources
from smolctl.data.text.documents import Document, OnRead
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokens.cache import (
    FORMAT,
    Manifest,
    OnProgress,
    TokenizedCorpus,
    digest,
    folder_of,
    held_out_rule,
    locked,
    read_manifest,
    whole_or_absent,
    write_manifest,
)
from smolctl.data.tokens.encoding import TokenizeProgress, encode_documents
from smolctl.data.tokens.shards import ShardWriter, TokenStream, token_dtype
from smolctl.errors import InputError


@dataclass(frozen=True, kw_only=True)
class WholeManifest(Manifest):
    """What the manifest of one or several sources says."""

    sources: tuple[str, ...]


def tokenize_whole(
    sources: Sequence[Source],
    data: DataConfig,
    tokenizer: Tokenizer,
    cache: Path,
    on_progress: OnProgress | None = None,
) -> TokenizedCorpus:
    """Encode all documents of the sources, one source after another, or find them in the cache.

    Raises:
        InputError: a source is binary, damaged or empty, or shorter than one window; the disk is full.
    """
    identities = [[source.name, source.identity] for source in sources]
    folder = folder_of(cache, [FORMAT, identities], data, tokenizer)
    manifest = _open(folder)
    if manifest is None:
        with locked(folder):
            manifest = _open(folder) or _build(folder, data, sources, tokenizer, on_progress)
    return _split(folder, manifest, data)


def _open(folder: Path) -> WholeManifest | None:
    """The manifest of a finished result, or None when there is none or its files do not agree with it."""
    content = read_manifest(folder)
    try:
        return WholeManifest(**content | {"sources": tuple(content["sources"])}) if content else None
    except (TypeError, KeyError):
        return None


def _build(
    folder: Path,
    data: DataConfig,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    on_progress: OnProgress | None,
) -> WholeManifest:
    dtype = token_dtype(tokenizer.vocab_size)
    is_held_out = held_out_rule(data)
    last = TokenizeProgress()
    total = sum(source.size or 0 for source in sources)

    def read(on_read: OnRead) -> Iterator[Document]:
        for source in sources:
            yield from source.read(on_read)

    with (
        whole_or_absent(folder) as partial,
        closing(ShardWriter(partial, "train", dtype)) as train,
        closing(ShardWriter(partial, "held-out", dtype)) as held_out,
        closing(encode_documents(read, tokenizer, total)) as batches,
    ):
        for batch in batches:
            ids: tuple[list[int], list[int]] = ([], [])  # to train on, held out
            for piece in batch.pieces:
                ids[is_held_out(piece.document)].extend(piece.ids)
            train.append(ids[0])
            held_out.append(ids[1])
            last = batch.progress
            if on_progress is not None:
                on_progress(last)
        _check_read(sources, data, last)
        manifest = WholeManifest(
            tokenizer=tokenizer.sha256,
            sources=tuple(source.name for source in sources),
            dtype=dtype.str,
            documents=last.documents,
            tokens=last.tokens,
            bytes=last.bytes,
            train=train.finish(),
            held_out=held_out.finish(),
        )
        write_manifest(partial, manifest)
    return manifest


def _check_read(sources: Sequence[Source], data: DataConfig, last: TokenizeProgress) -> None:
    """Something was read, and it is still what it was when its identity was taken."""
    names = ", ".join(source.name for source in sources)
    if not last.documents:
        raise InputError(f"the corpus is empty: no text in {names}", "Name files that hold text.")
    now = open_sources([source.name for source in sources], data.text_field)
    if [source.identity for source in now] != [source.identity for source in sources]:
        raise InputError(f"{names}: changed while it was read", "Run again when nobody writes to it.")


def _split(folder: Path, manifest: Manifest, data: DataConfig) -> TokenizedCorpus:
    """Decide what is trained on: all but the documents held out, or all but the last tokens.

    Documents that were held out lie behind the others, so both are a range of the same files.
    """
    window = data.sequence_length + 1
    if manifest.tokens < window:
        raise InputError(
            f"the corpus has {manifest.tokens:,} tokens; a sequence takes sequence_length + 1 = {window:,}",
            "Add text, or lower data.sequence_length.",
        )
    held_out, notes = _held_out_tokens(manifest, data, window)
    length = manifest.tokens - held_out
    shards = manifest.train + manifest.held_out
    files = [(folder / shard.file, shard.tokens) for shard in shards]
    dtype = np.dtype(manifest.dtype)
    validation = Part(TokenStream(files, dtype, length, held_out))
    return TokenizedCorpus(
        folders=(folder,),
        fingerprint=digest([manifest.dtype, length, [shard.sha256 for shard in shards]]),
        train=Mixture((Part(TokenStream(files, dtype, 0, length)),)),
        validation=Mixture((validation,)) if held_out else None,
        documents=manifest.documents,
        tokens=manifest.tokens,
        bytes=manifest.bytes,
        notes=notes,
    )


def _held_out_tokens(manifest: Manifest, data: DataConfig, window: int) -> tuple[int, tuple[str, ...]]:
    """How many tokens at the end are held out, and what to tell the user about it.

    With few documents chance may hold out none, or nearly all of the text. Then the last tokens are
    held out instead, wherever in a document they begin.
    """
    fraction = data.validation_fraction
    if not fraction:
        return 0, ()
    by_document = sum(shard.tokens for shard in manifest.held_out)
    if window <= by_document <= min(10 * fraction * manifest.tokens, manifest.tokens - window):
        return by_document, ()
    last = max(window, round(fraction * manifest.tokens))
    if last > manifest.tokens / 2:
        return 0, ("The corpus is too short to hold out one sequence: there is no validation.",)
    return last, (
        f"Too few documents ({manifest.documents:,}) to hold some of them out: "
        f"the last {last:,} tokens of the corpus are held out.",
    )
