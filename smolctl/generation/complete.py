"""Text in, text out: tokens around the engine, stop rules, and timing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from smolctl.data.tokenizer import Tokenizer
from smolctl.generation.decode import decode
from smolctl.generation.engine import Engine
from smolctl.generation.sampling import SamplingSettings


@dataclass(frozen=True)
class CompletionSettings:
    """What to generate and where to stop."""

    max_tokens: int = 128
    samples: int = 1  # completions of the one prompt
    stop: tuple[str, ...] = ()  # texts that end a completion and are not part of it
    seed: int = 0
    sampling: SamplingSettings = field(default_factory=SamplingSettings)


@dataclass(frozen=True)
class Completion:
    """One continuation of the prompt."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # nats, under the unmodified model
    finish_reason: str  # "stop": end of text or a stop text; "length": max_tokens or the context's end


@dataclass(frozen=True)
class Timing:
    """Where the time went."""

    prompt_tokens: int
    first_token_s: float  # prefill and the first choice
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None  # over all samples; None when a single token came


@dataclass(frozen=True)
class CompletionResult:
    """All completions of one prompt by one model."""

    prompt: str
    completions: tuple[Completion, ...]
    timing: Timing


# Called with (sample, new text) as soon as the text cannot change any more.
TextListener = Callable[[int, str], None]


class _Sequence:
    """One completion while it grows."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], ends: frozenset[int]) -> None:
        self.stream = tokenizer.stream()
        self.stop, self.ends = stop, ends
        self.text = ""  # decoded so far
        self.emitted = 0  # characters of it that the listener has seen
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason = ""

    def add(self, token: int, logprob: float) -> str:
        """Take a token and return the text that it made certain."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.ends:
            self.finish_reason = "stop"
            return self._rest()
        self.text += self.stream.feed(token)
        cuts = [at for at in (self.text.find(stop, self.emitted) for stop in self.stop) if at >= 0]
        if cuts:
            self.text = self.text[: min(cuts)]
            self.finish_reason = "stop"
            return self._rest(flush=False)
        held = max((_overlap(self.text[self.emitted :], stop) for stop in self.stop), default=0)
        return self._emit(len(self.text) - held)

    def finish(self) -> str:
        """End for lack of room and return what was held back."""
        self.finish_reason = "length"
        return self._rest()

    def _rest(self, flush: bool = True) -> str:
        if flush:
            self.text += self.stream.finish()
        return self._emit(len(self.text))

    def _emit(self, end: int) -> str:
        fresh = self.text[self.emitted : end]
        self.emitted = max(self.emitted, end)
        return fresh

    def completion(self) -> Completion:
        return Completion(self.text, tuple(self.tokens), tuple(self.logprobs), self.finish_reason)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`: it may still become it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    settings: CompletionSettings,
    on_text: TextListener | None = None,
) -> CompletionResult:
    """Continue a prompt `settings.samples` times, streaming text as it becomes certain.

    Args:
        engine: the model.
        tokenizer: the model's own.
        prompt: text, with a chat template already applied if there is one.
        settings: lengths, stops, seed and how tokens are chosen.
        on_text: called with every piece of text, in order for each sample.

    Raises:
        InputError: the prompt is empty or does not fit the context.
    """
    listen = on_text or (lambda _sample, _text: None)
    ids = tokenizer.encode(prompt) or [i for i in (tokenizer.bos_token_id,) if i is not None]
    ends = frozenset(engine.config.eos_token_ids) | tokenizer.end_token_ids
    sequences = [_Sequence(tokenizer, settings.stop, ends) for _ in range(settings.samples)]

    started = time.perf_counter()
    first_at = started
    steps = 0
    for step in decode(engine, ids, settings.samples, settings.max_tokens, settings.sampling, settings.seed):
        pairs = zip(step.tokens.tolist(), step.logprobs.tolist(), strict=True)
        steps += 1
        if steps == 1:
            first_at = time.perf_counter()
        for sample, (token, logprob) in enumerate(pairs):
            if not sequences[sample].finish_reason:
                text = sequences[sample].add(token, logprob)
                if text:
                    listen(sample, text)
        if all(sequence.finish_reason for sequence in sequences):
            break
    ended = time.perf_counter()
    for sample, sequence in enumerate(sequences):
        if not sequence.finish_reason and (text := sequence.finish()):
            listen(sample, text)

    decode_rate = settings.samples * (steps - 1) / (ended - first_at) if steps > 1 else None
    timing = Timing(
        prompt_tokens=len(ids),
        first_token_s=first_at - started,
        prefill_tokens_per_s=len(ids) / (first_at - started),
        decode_tokens_per_s=decode_rate,
    )
    return CompletionResult(prompt, tuple(s.completion() for s in sequences), timing)
