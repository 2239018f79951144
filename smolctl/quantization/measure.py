"""Measures a variant against its source, in turns and on the same text: quality and speed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.evaluation import (
    Estimate,
    bits,
    by_document,
    observations,
    ratio_estimate,
    resampled_estimate,
    score_tokens,
)
from smolctl.evaluation.measure import TokenScores
from smolctl.generation.engine import Engine
from smolctl.quantization.texts import Windows
from smolctl.timing import Spread, ratio_of

# Text, code, a list and a question, on which the greedy continuations of source and variant are compared.
PROMPTS = (
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "The capital of France is Paris. The capital of Italy is",
    "What makes the sky blue? The light of the sun",
)
DECODED_TOKENS = 32  # per prompt
PREFILL_TOKENS = 256
TURN_SECONDS = 0.2  # of decoding per turn: a small model repeats the same work


@dataclass(frozen=True)
class Quality:
    """The quality of a variant's predictions compared with its source's."""

    bits_per_byte: Estimate
    source_bits_per_byte: Estimate
    delta: Estimate  # of bits per byte; paired, because both process the same documents
    kl: Estimate  # nats per token, KL(source ‖ variant)
    kl_documents: tuple[float, ...]  # sum over each document, for comparing variants
    top1_agreement: float
    tokens: int
    perplexity: float  # per token
    source_perplexity: float

    @property
    def finite(self) -> bool:
        """Whether every prediction of the variant and of its source was finite."""
        return math.isfinite(self.kl.mean) and math.isfinite(self.delta.mean)


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a variant and of its source, in turns."""

    decode: Spread
    prefill: Spread
    source_decode: Spread
    source_prefill: Spread
    speedup: Spread  # of decoding: one ratio per turn
    prefill_speedup: Spread


@dataclass(frozen=True)
class GreedyDivergence:
    """Where a variant's greedy text departs from the source's; tokens count from 0."""

    first: tuple[int | None, ...]  # for each prompt, the first token that differs; None: no difference
    tokens: int  # decoded per prompt


def measure_quality(source: Engine, variants: Sequence[Engine], windows: Windows) -> list[Quality]:
    """Score every sequence with the source once and with each variant, and compare the predictions."""
    theirs: list[TokenScores] = []
    ours: list[list[TokenScores]] = [[] for _ in variants]
    for window, counted in zip(windows.measured, windows.counted, strict=True):
        inputs, targets = window[:-1].tolist(), window[1:][counted]
        reference = _logits(source, inputs)[counted]
        theirs.append(score_tokens(reference, targets))
        for scores, variant in zip(ours, variants, strict=True):
            scores.append(score_tokens(_logits(variant, inputs)[counted], targets, reference))
    counted = torch.cat(windows.counted)
    sizes = windows.token_bytes[torch.cat([window[1:] for window in windows.measured])][counted]
    numbers = [torch.full_like(one, number) for number, one in enumerate(windows.documents)]
    documents = observations(torch.cat(windows.documents)[counted], torch.cat(numbers)[counted])
    return [_quality(scores, theirs, documents, sizes) for scores in ours]


def _quality(
    ours: Sequence[TokenScores], theirs: Sequence[TokenScores], documents: NDArray[np.int64], sizes: Tensor
) -> Quality:
    """The quality as estimates over documents.

    Args:
        ours: of a variant, by sequence.
        theirs: of its source.
        documents: the number of each token's document, or of its sequence if there are few documents.
        sizes: bytes of each token.
    """
    nats, source_nats, kl, agrees = (
        torch.cat(column)
        for column in (
            [scores.nats for scores in ours],
            [scores.nats for scores in theirs],
            [scores.kl for scores in ours],
            [scores.agrees for scores in ours],
        )
    )
    own, source, bytes_, divergence, tokens = by_document(
        documents, bits(nats), bits(source_nats), sizes, kl, torch.ones_like(kl)
    )
    bytes_ = np.maximum(bytes_, 1)
    mean_kl = ratio_estimate(divergence, tokens)
    return Quality(
        bits_per_byte=ratio_estimate(own, bytes_),
        source_bits_per_byte=ratio_estimate(source, bytes_),
        delta=resampled_estimate(own, bytes_, source),
        kl=replace(mean_kl, mean=0.0) if mean_kl.mean < 0 else mean_kl,  # negative by rounding
        kl_documents=tuple(divergence),
        top1_agreement=agrees.double().mean().item(),
        tokens=len(nats),
        perplexity=_perplexity(nats),
        source_perplexity=_perplexity(source_nats),
    )


def _perplexity(nats: Tensor) -> float:
    return math.exp(min(nats.mean().item(), 700.0))  # a float is infinite beyond that


def mean_kl(reference: Engine, variant: Engine, windows: Sequence[Tensor]) -> float:
    """Nats per token of KL(reference ‖ variant)."""
    found = [
        score_tokens(_logits(variant, inputs), window[1:], _logits(reference, inputs)).kl
        for window in windows
        for inputs in [window[:-1].tolist()]
    ]
    mean = torch.cat(found).mean().item()
    return 0.0 if mean < 0 else mean  # negative by rounding; not max(), which may drop a NaN


def _logits(engine: Engine, tokens: Sequence[int]) -> Tensor:
    return torch.from_numpy(engine.forward([tokens], engine.allocate(1, len(tokens)), every=True))


def measure_speed(
    source: Engine, variants: Sequence[Engine], tokenizer: Tokenizer
) -> list[tuple[Speed, GreedyDivergence]]:
    """Continue the fixed prompts greedily and process a longer one, with every model once per turn.

    The order changes from turn to turn, so a machine that slows down favours none of them.
    """
    prompts = [_prompt(tokenizer, text, source) for text in PROMPTS]
    length = min(PREFILL_TOKENS, source.config.max_position_embeddings)
    long = [token for prompt in prompts * PREFILL_TOKENS for token in prompt][:length]
    engines = (source, *variants)
    for engine in engines:  # the first call sets up threads and buffers
        _greedy(engine, prompts[0], 2)
    decode: list[list[float]] = [[] for _ in engines]
    prefill: list[list[float]] = [[] for _ in engines]
    first: list[list[int | None]] = [[] for _ in engines]
    for turn, prompt in enumerate(prompts):
        texts: dict[int, list[int]] = {}
        for place in range(len(engines)):
            index = (place + turn) % len(engines)
            engine, seconds, goes = engines[index], 0.0, 0
            while seconds < TURN_SECONDS:
                texts[index], more = _greedy(engine, prompt, DECODED_TOKENS)
                seconds, goes = seconds + more, goes + 1
            decode[index].append(goes * (len(texts[index]) - 1) / seconds)
            prefill[index].append(_prefill(engine, long))
        for index, tokens in texts.items():
            pairs = enumerate(zip(texts[0], tokens, strict=True))
            first[index].append(next((at for at, (a, b) in pairs if a != b), None))
    results = []
    for index in range(1, len(engines)):
        speed = Speed(
            decode=Spread.of(decode[index]),
            prefill=Spread.of(prefill[index]),
            source_decode=Spread.of(decode[0]),
            source_prefill=Spread.of(prefill[0]),
            speedup=ratio_of(decode[index], decode[0]).spread,
            prefill_speedup=ratio_of(prefill[index], prefill[0]).spread,
        )
        results.append((speed, GreedyDivergence(tuple(first[index]), DECODED_TOKENS)))
    return results


def _prompt(tokenizer: Tokenizer, text: str, engine: Engine) -> list[int]:
    room = engine.config.max_position_embeddings
    return (tokenizer.encode(text) or [0])[: max(1, min(room // 2, room - DECODED_TOKENS))]


def _greedy(engine: Engine, prompt: Sequence[int], count: int) -> tuple[list[int], float]:
    """The likeliest continuation, and the seconds for all its tokens except the first."""
    capacity = min(len(prompt) + count, engine.config.max_position_embeddings)
    cache = engine.allocate(1, capacity)
    tokens = [int(engine.forward([prompt], cache).argmax())]
    started = time.perf_counter()
    while len(prompt) + len(tokens) < capacity:
        tokens.append(int(engine.forward([tokens[-1:]], cache).argmax()))
    return tokens, max(1e-9, time.perf_counter() - started)


def _prefill(engine: Engine, tokens: Sequence[int]) -> float:
    cache = engine.allocate(1, len(tokens))
    started = time.perf_counter()
    engine.forward([tokens], cache)
    return len(tokens) / (time.perf_counter() - started)
