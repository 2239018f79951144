"""Sources of known size, tokenized completely: files, folders and the built-in corpus."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smolctl.config.data import DataConfig
from smolctl.data.text.corpus import SequenceLengthError, Source, open_sources
from smolctl.data.text.documents import Document, OnRead
from smolctl.data.tokenizer.text_encoder import TextEncoder
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokens.cache import (
    FORMAT,
    LEAST_HELD_OUT,
    TOKENS,
    Manifest,
    OnNote,
    OnProgress,
    TokenizedCorpus,
    digest,
    folder_of,
    found_or_built,
    held_out_limit,
    read_manifest,
    whole_or_absent,
    write_manifest,
)
from smolctl.data.tokens.encoding import TokenizeProgress, encode_documents
from smolctl.data.tokens.mixture import Mixture, Part
from smolctl.data.tokens.shards import ShardWriter, TokenStream, disk_errors, token_dtype
from smolctl.errors import InputError

DIGESTS = "documents.bin"  # `DocumentPiece.digest` of every distinct document, sorted; little-endian uint64


@dataclass(frozen=True, kw_only=True)
class WholeManifest(Manifest):
    """The manifest of one or several sources.

    A small corpus may have no document below `held_out_limit`, or none that is long enough. So the shards
    store the documents below twice that limit separately, those below four times, and so on up to half of
    all. Those below the lowest of these limits that gives enough tokens are held out; how many are enough
    depends on the run.

    Attributes:
        held_out: documents that may be held out; those below the lowest limit are at the end.
        held_out_tokens: below the lowest limit, below twice that, below four times ...
    """

    sources: tuple[str, ...]
    empty: int  # texts without a character
    held_out_tokens: tuple[int, ...]


def tokenize_whole(
    sources: Sequence[Source],
    data: DataConfig,
    tokenizer: Tokenizer,
    cache: Path,
    on_progress: OnProgress | None,
    on_note: OnNote,
) -> TokenizedCorpus:
    """Encode all documents of the sources, one source after another, or find them in the cache.

    Arguments as in `tokenize_corpus`.

    Raises:
        InputError: a source is binary, damaged or empty, or shorter than one window.
        DiskError: the disk is full.
    """
    identities = [[source.name, source.identity] for source in sources]
    folder = folder_of(cache, [FORMAT, identities], data, tokenizer)
    manifest = found_or_built(
        folder,
        lambda on_note: read_manifest(folder, WholeManifest, tokenizer, on_note),
        lambda: _build(folder, data, sources, tokenizer, on_progress),
        on_note,
    )
    return _split(folder, manifest, data)


def find_tokenized(
    cache: Path, folders: Sequence[str], data: DataConfig, tokenizer: Tokenizer
) -> TokenizedCorpus | None:
    """The tokens of missing sources, in the cache folders that a run was trained on."""
    for name in folders:
        manifest = read_manifest(cache / TOKENS / name, WholeManifest, tokenizer, lambda _: None)
        if manifest is not None and manifest.sources == data.source:
            return _split(cache / TOKENS / name, manifest, data)
    return None


def _build(
    folder: Path,
    data: DataConfig,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    on_progress: OnProgress | None,
) -> WholeManifest:
    dtype = token_dtype(tokenizer.vocab_size)
    limit = held_out_limit(data.validation_fraction)
    trained_on = max(1, _group(2**63, limit)) if limit else 0  # the last group, never held out
    names = [*(f"held-out-{group}" for group in range(trained_on)), "train"]
    digests = array("Q")  # of whole documents: eight bytes each
    document = group = -1
    last = TokenizeProgress()
    total = sum(source.size or 0 for source in sources)

    def read(on_read: OnRead) -> Iterator[Document]:
        for source in sources:
            yield from source.read(on_read)

    with (
        whole_or_absent(folder) as partial,
        ExitStack() as open_files,
        closing(encode_documents(read, TextEncoder(tokenizer, data.special_tokens), total)) as batches,
    ):
        groups = [open_files.enter_context(closing(ShardWriter(partial, name, dtype))) for name in names]
        for batch in batches:
            ids: list[list[NDArray[np.uint32]]] = [[] for _ in groups]
            for piece in batch.pieces:
                if piece.document != document:  # its first piece
                    document, group = piece.document, min(_group(piece.digest, limit), trained_on)
                ids[group].append(piece.ids)
                if piece.ends:
                    digests.append(piece.digest)
            for writer, more in zip(groups, ids, strict=True):
                writer.append(np.concatenate(more) if more else ())
            last = batch.progress
            if on_progress is not None:
                on_progress(last)
        _check_read(sources, data, last)
        different = np.unique(np.frombuffer(digests, np.uint64))
        with disk_errors(partial):
            different.astype("<u8").tofile(partial / DIGESTS)
        *held_out, train = [writer.finish() for writer in groups]
        manifest = WholeManifest(
            tokenizer=tokenizer.sha256,
            sources=tuple(source.name for source in sources),
            dtype=dtype.str,
            documents=last.documents,
            duplicates=last.documents - len(different),
            tokens=last.tokens,
            bytes=last.bytes,
            special_tokens=last.special_tokens,
            empty=last.empty,
            train=train,
            held_out=tuple(chain.from_iterable(reversed(held_out))),
            held_out_tokens=tuple(accumulate(writer.tokens for writer in groups[:-1])),
        )
        write_manifest(partial, manifest)
    return manifest


def _group(digest: int, limit: int) -> int:
    """0 below the limit, 1 below twice the limit, 2 below four times, and so on."""
    return (digest // limit).bit_length() if limit else 0


def common_documents(one: TokenizedCorpus, other: TokenizedCorpus) -> int:
    """How many distinct documents are in both; not known for a Hub dataset."""

    def digests(corpus: TokenizedCorpus) -> NDArray[np.uint64]:
        files = [folder / DIGESTS for folder in corpus.folders]
        known = [np.fromfile(file, "<u8") for file in files if file.is_file()]
        return np.concatenate([np.empty(0, np.uint64), *known])

    return len(np.intersect1d(digests(one), digests(other)))


def _check_read(sources: Sequence[Source], data: DataConfig, last: TokenizeProgress) -> None:
    """Check that something was read, and that it has not changed since its identity was computed."""
    names = ", ".join(source.name for source in sources)
    if not last.documents:
        raise InputError(f"the corpus is empty: no text in {names}", "Name files that contain text.")
    now = open_sources(data)
    if [source.identity for source in now] != [source.identity for source in sources]:
        raise InputError(
            f"{names}: changed while it was read", "Run again when no other program is writing to it."
        )


def _split(folder: Path, manifest: WholeManifest, data: DataConfig) -> TokenizedCorpus:
    """Choose the training tokens: all except the held-out documents, or all except the last tokens.

    Both are a range of the same files.
    """
    window = data.sequence_length + 1
    if manifest.tokens < window:
        raise SequenceLengthError(
            f"{', '.join(manifest.sources)} has {manifest.tokens:,} tokens; "
            f"a sequence takes sequence_length + 1 = {window:,}",
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
        duplicates=manifest.duplicates,
        tokens=manifest.tokens,
        bytes=manifest.bytes,
        notes=notes,
        special_tokens=manifest.special_tokens,
        empty=manifest.empty,
    )


def _held_out_tokens(manifest: WholeManifest, data: DataConfig, window: int) -> tuple[int, tuple[str, ...]]:
    """The number of held-out tokens at the end, and a note for the user.

    With few documents, nearly all of the text might be held out by chance. Then the last tokens are held out
    instead, wherever in a document they begin, unless some documents are copies, of which they could be
    parts.
    """
    fraction, tokens = data.validation_fraction, manifest.tokens
    if not fraction:
        return 0, ()
    least, most = min(window, LEAST_HELD_OUT), tokens - window
    share = max(10 * fraction, 0.5 if manifest.duplicates else 0)
    by_document = next((count for count in manifest.held_out_tokens if count >= least), 0)
    if 0 < by_document <= min(share * tokens, most):
        return by_document, ()
    if manifest.duplicates:
        return 0, (
            f"Only {manifest.documents - manifest.duplicates:,} of {manifest.documents:,} documents are "
            "different, too few to hold some of them out: there is no validation. Name a file for it: "
            "data.validation.",
        )
    last = max(least, round(fraction * tokens))
    if last > min(tokens / 2, most):
        return 0, ("The corpus is too short to hold out a part of it: there is no validation.",)
    return last, (
        f"Too few documents ({manifest.documents:,}) to hold some of them out: "
        f"the last {last:,} tokens of the corpus are held out. "
        "data.validation_fraction=0 trains on all of it, data.validation names a file to hold out.",
    )
