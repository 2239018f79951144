"""A corpus as tokens: encoded once, kept in a cache, mapped into memory from then on."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from smolctl.config.run import DataConfig
from smolctl.data.corpus import Source, open_sources
from smolctl.data.encoding import TokenizeProgress, encode_documents
from smolctl.data.token_files import (
    Shard,
    ShardWriter,
    TokenStream,
    disk_errors,
    sync_folder,
    token_dtype,
    write_synced,
)
from smolctl.data.tokenizer import Tokenizer
from smolctl.errors import InputError

__all__ = ["TokenStream", "TokenizeProgress", "TokenizedCorpus", "tokenize_corpus"]

FORMAT = 1  # of the folder; an older one is never read
MANIFEST = "manifest.json"
OnProgress = Callable[[TokenizeProgress], None]


@dataclass(frozen=True)
class TokenizedCorpus:
    """Tokens to train on and tokens to validate on.

    Attributes:
        folder: the shards and their manifest.
        fingerprint: SHA-256 that identifies the training tokens and their order.
        train: tokens to train on; every document ends with the end-of-text token.
        validation: tokens held out, or None.
        documents: texts in both parts.
        tokens: in both parts.
        bytes: of UTF-8 text in both parts.
        notes: what the user should know about the split.
    """

    folder: Path
    fingerprint: str
    train: TokenStream
    validation: TokenStream | None
    documents: int
    tokens: int
    bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    tokenizer: str  # sha256
    sources: tuple[str, ...]
    dtype: str
    documents: int
    tokens: int
    bytes: int
    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]
    format: int = FORMAT

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, those held out last."""
        return self.train + self.held_out


def tokenize_corpus(
    data: DataConfig,
    tokenizer: Tokenizer,
    cache: Path | None = None,
    on_progress: OnProgress | None = None,
    max_tokens: int | None = None,
) -> TokenizedCorpus:
    """Encode a corpus, or find it in the cache.

    An interrupted call leaves nothing that looks finished. Several processes may call it at once:
    one works, the others wait for it.

    Args:
        data: sources, text field, held-out share and seed.
        tokenizer: gives the ids.
        cache: folder of the results; None is `$SMOLCTL_CACHE` or `~/.cache/smolctl`.
        on_progress: called after every batch of text; what it raises stops the work.
        max_tokens: stop once there are so many, for Hub datasets that are larger than a run needs.

    Raises:
        InputError: a source is missing, binary, damaged or empty; the corpus is shorter than one
            window; the disk is full.
        HubError: a Hub dataset cannot be had.
    """
    sources = open_sources(data.source, data.text_field)
    folder = (cache or cache_folder()) / "tokens" / _key(data, sources, tokenizer, max_tokens)
    manifest = _open(folder)
    if manifest is None:
        lock = FileLock(f"{folder}.lock")
        with disk_errors(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            manifest = _open(folder) or _build(folder, data, sources, tokenizer, on_progress, max_tokens)
        finally:
            lock.release()
    return _split(folder, manifest, data)


def cache_folder() -> Path:
    """`$SMOLCTL_CACHE`, or `~/.cache/smolctl`."""
    named = os.environ.get("SMOLCTL_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "smolctl"


def _key(data: DataConfig, sources: list[Source], tokenizer: Tokenizer, max_tokens: int | None) -> str:
    """A name for the result that changes with everything that changes the result."""
    parts = [
        FORMAT,
        [[source.name, source.identity] for source in sources],
        [tokenizer.sha256, tokenizer.end_of_text_id],
        [data.validation_fraction, data.seed, data.text_field, max_tokens],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _open(folder: Path) -> Manifest | None:
    """The manifest of a finished result, or None when there is none or its files do not agree with it."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        parts = {part: tuple(Shard(**shard) for shard in content.pop(part)) for part in ("train", "held_out")}
        manifest = Manifest(**content | parts | {"sources": tuple(content["sources"])})
        width = np.dtype(manifest.dtype).itemsize
        sizes = [(folder / shard.file).stat().st_size for shard in manifest.shards]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    agrees = sizes == [shard.tokens * width for shard in manifest.shards]
    return manifest if agrees and manifest.format == FORMAT else None


def _build(
    folder: Path,
    data: DataConfig,
    sources: list[Source],
    tokenizer: Tokenizer,
    on_progress: OnProgress | None,
    max_tokens: int | None,
) -> Manifest:
    """Write everything beside its place, then move it there in one step. The lock is held."""
    for leftover in folder.parent.glob(f"{folder.name}-*.partial"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # damaged, or it would have been opened
    partial = folder.with_name(f"{folder.name}-{secrets.token_hex(4)}.partial")
    try:
        with disk_errors(folder.parent):
            partial.mkdir()
        manifest = _encode_into(partial, data, sources, tokenizer, on_progress, max_tokens)
        with disk_errors(folder.parent):
            write_synced(partial / MANIFEST, json.dumps(asdict(manifest), indent=2).encode())
            partial.rename(folder)
            sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _encode_into(
    folder: Path,
    data: DataConfig,
    sources: list[Source],
    tokenizer: Tokenizer,
    on_progress: OnProgress | None,
    max_tokens: int | None,
) -> Manifest:
    dtype = token_dtype(tokenizer.vocab_size)
    last = TokenizeProgress()
    with (
        closing(ShardWriter(folder, "train", dtype)) as train,
        closing(ShardWriter(folder, "held-out", dtype)) as held_out,
        closing(encode_documents(sources, tokenizer, _is_held_out(data))) as batches,
    ):
        for batch in batches:
            train.append(batch.train)
            held_out.append(batch.held_out)
            last = batch.progress
            if on_progress is not None:
                on_progress(last)
            if max_tokens is not None and last.tokens >= max_tokens:
                break
        _check_read(sources, data, last)
        return Manifest(
            tokenizer=tokenizer.sha256,
            sources=data.source,
            dtype=dtype.str,
            documents=last.documents,
            tokens=last.tokens,
            bytes=last.bytes,
            train=train.finish(),
            held_out=held_out.finish(),
        )


def _check_read(sources: list[Source], data: DataConfig, last: TokenizeProgress) -> None:
    """Something was read, and it is still what it was when its identity was taken."""
    names = ", ".join(data.source)
    if not last.documents:
        raise InputError(f"the corpus is empty: no text in {names}", "Name files that hold text.")
    now = [source.identity for source in open_sources(data.source, data.text_field)]
    if now != [source.identity for source in sources]:
        raise InputError(f"{names}: changed while it was read", "Run again when nobody writes to it.")


def _is_held_out(data: DataConfig) -> Callable[[int], bool]:
    """A share of the documents, chosen by a hash of the seed and the document's number."""
    key = data.seed.to_bytes(8, "little")
    limit = int(data.validation_fraction * 2**64)

    def is_held_out(number: int) -> bool:
        digest = hashlib.blake2b(number.to_bytes(8, "little"), key=key, digest_size=8).digest()
        return int.from_bytes(digest, "little") < limit

    return is_held_out


def _split(folder: Path, manifest: Manifest, data: DataConfig) -> TokenizedCorpus:
    """Decide what is trained on: all but the documents held out, or all but the last tokens.

    Documents that were held out lie behind the others, so both are a range of the same files.
    """
    window = data.sequence_length + 1
    if manifest.tokens < window:
        raise InputError(
            f"the corpus has {manifest.tokens:,} tokens, a window of data.sequence_length + 1 has {window:,}",
            "Add text, or lower data.sequence_length.",
        )
    held_out, notes = _held_out_tokens(manifest, data, window)
    length = manifest.tokens - held_out
    files = [(folder / shard.file, shard.tokens) for shard in manifest.shards]
    dtype = np.dtype(manifest.dtype)
    identity = [manifest.dtype, length, [shard.sha256 for shard in manifest.shards]]
    return TokenizedCorpus(
        folder=folder,
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        train=TokenStream(files, dtype, 0, length),
        validation=TokenStream(files, dtype, length, held_out) if held_out else None,
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
        return 0, ("The corpus is too short to hold out a window of it: there is no validation.",)
    return last, (
        f"Too few documents ({manifest.documents:,}) to hold some of them out: "
        f"the last {last:,} tokens of the corpus are held out.",
    )
