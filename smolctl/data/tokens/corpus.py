"""A corpus as tokens: encoded once, kept in a cache, mapped into memory from then on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from smolctl.config.run import DataConfig
from smolctl.data.mixture import Mixture
from smolctl.data.order import MIXTURE, shares_of
from smolctl.data.text.corpus import open_sources, pin_sources
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokens.cache import OnProgress, TokenizedCorpus, digest
from smolctl.data.tokens.encoding import TokenizeProgress
from smolctl.data.tokens.shards import TokenStream
from smolctl.data.tokens.streamed import tokenize_stream
from smolctl.data.tokens.whole import tokenize_whole
from smolctl.durable import cache_folder
from smolctl.errors import InputError

__all__ = ["TokenStream", "TokenizeProgress", "TokenizedCorpus", "tokenize_corpus"]


def tokenize_corpus(
    data: DataConfig,
    tokenizer: Tokenizer,
    cache: Path | None = None,
    on_progress: OnProgress | None = None,
    samples: int | None = None,
) -> TokenizedCorpus:
    """Encode a corpus, or find it in the cache.

    An interrupted call leaves nothing that looks finished. Several processes may call it at once:
    one works, the others wait for it.

    Args:
        data: sources, their weights, text field, held-out share and seed.
        tokenizer: gives the ids.
        cache: folder of the results; None is `$SMOLCTL_CACHE` or `~/.cache/smolctl`.
        on_progress: called after every batch of text; what it raises stops the work.
        samples: windows that the run reads from its first step to its last: no more of a Hub dataset is
            streamed than they need. None streams it to its end.

    Raises:
        InputError: a source is missing, binary, damaged or empty; the corpus is shorter than one
            window; the disk is full; a Hub dataset stands beside other sources without weights.
        HubError: a Hub dataset cannot be had.
    """
    cache = cache or cache_folder()
    names = pin_sources(data.source)
    if data.weights is None:
        return _tokenize(names, data, tokenizer, cache, on_progress, samples)
    shares = shares_of(data.weights)
    blocks = None if samples is None else -(-samples // MIXTURE)
    parts = [
        _tokenize((name,), data, tokenizer, cache, on_progress, None if blocks is None else blocks * share)
        for name, share in zip(names, shares, strict=True)
    ]
    return parts[0] if len(parts) == 1 else _mixed(parts, shares, names)


def _tokenize(
    names: tuple[str, ...],
    data: DataConfig,
    tokenizer: Tokenizer,
    cache: Path,
    on_progress: OnProgress | None,
    samples: int | None,
) -> TokenizedCorpus:
    sources = open_sources(names, data.text_field)
    dataset = next((source.dataset for source in sources if source.dataset is not None), None)
    if dataset is None:
        return tokenize_whole(sources, data, tokenizer, cache, on_progress)
    if len(sources) > 1:
        raise InputError(
            f"{dataset}: a Hub dataset is streamed, so it cannot be shuffled together with other sources",
            f"Say how much comes from each, for example data.weights={[1] * len(sources)}.",
        )
    return tokenize_stream(dataset, data, tokenizer, cache, samples, on_progress)


def _mixed(parts: list[TokenizedCorpus], shares: tuple[int, ...], names: tuple[str, ...]) -> TokenizedCorpus:
    """Sources of one part each as one corpus."""

    def mixture(of: list[Mixture | None]) -> Mixture:
        chosen = [(one.parts[0], share) for one, share in zip(of, shares, strict=True) if one is not None]
        return Mixture(tuple(replace(part, share=share) for part, share in chosen))

    held_out = mixture([part.validation for part in parts])
    return TokenizedCorpus(
        folders=tuple(folder for part in parts for folder in part.folders),
        fingerprint=digest([shares, [part.fingerprint for part in parts]]),
        train=mixture([part.train for part in parts]),
        validation=held_out if held_out.parts else None,
        documents=sum(part.documents for part in parts),
        tokens=sum(part.tokens for part in parts),
        bytes=sum(part.bytes for part in parts),
        notes=tuple(
            f"{name}: {share / MIXTURE:.1%} of the samples. {' '.join(part.notes)}".strip()
            for name, share, part in zip(names, shares, parts, strict=True)
        ),
    )
