"""Text in, text out: one prompt continued, with timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.generation.answer import Answer, Completion
from smolctl.generation.decode import Decoder, Job, Speculation, check_prompt, generator_for
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
    speculation: Speculation = "auto"
    alternatives: int = 0  # likeliest other tokens to report with each token


@dataclass(frozen=True)
class Timing:
    """Where the time went."""

    prompt_tokens: int
    reused_tokens: int  # of the prompt: they were in the cache already
    first_token_s: float  # prefill and the first choice
    prefill_tokens_per_s: float  # over the prompt tokens that were read
    decode_tokens_per_s: float | None  # over all samples; None when a single token came
    decode_steps: int  # calls of the engine after the prompt
    guessed_tokens: int  # read on a guess of the speculation
    accepted_tokens: int  # of these, what the model chose indeed


@dataclass(frozen=True)
class CompletionResult:
    """All completions of one prompt by one model."""

    prompt: str
    completions: tuple[Completion, ...]
    timing: Timing


# Called with (sample, new text) as soon as the text cannot change any more.
TextListener = Callable[[int, str], None]


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    settings: CompletionSettings,
    on_text: TextListener | None = None,
    decoder: Decoder | None = None,
    turn: int = 0,
) -> CompletionResult:
    """Continue a prompt `settings.samples` times, streaming text as it becomes certain.

    Args:
        engine: the model.
        tokenizer: the model's own.
        prompt: text, with a chat template already applied if there is one.
        settings: lengths, stops, seed and how tokens are chosen.
        on_text: called with every piece of text, in order for each sample.
        decoder: of an earlier call with the same settings; what it holds of the prompt is not read again.
        turn: another number, other chances with the same seed.

    Raises:
        InputError: the prompt is empty or does not fit the context.
    """
    ids = prompt_ids(tokenizer, prompt)
    context = decoder.capacity if decoder else engine.config.max_position_embeddings
    count = tokens_to_generate(len(ids), settings, context)
    jobs = [Job(ids, count, generator_for(settings.seed, turn, sample)) for sample in range(settings.samples)]
    answers = [new_answer(engine, tokenizer, settings) for _ in jobs]
    keep = decoder is not None
    started = time.perf_counter()
    decoder = decoder or new_decoder(engine, settings, settings.samples, len(ids) + count)
    before = replace(decoder.counts)
    first_at = None
    for _ in answer_all(decoder, jobs, answers, on_text or (lambda _sample, _text: None), keep):
        first_at = first_at or time.perf_counter()
    ended = time.perf_counter()
    first_at = first_at or ended
    done = decoder.counts - before
    later = sum(len(answer.tokens) - 1 for answer in answers)
    timing = Timing(
        prompt_tokens=len(ids),
        reused_tokens=done.reused,
        first_token_s=first_at - started,
        prefill_tokens_per_s=done.read / (first_at - started),
        decode_tokens_per_s=later / (ended - first_at) if later else None,
        decode_steps=done.steps,
        guessed_tokens=done.guessed,
        accepted_tokens=done.accepted,
    )
    return CompletionResult(prompt, tuple(answer.completion() for answer in answers), timing)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokens of a prompt; an empty one is the token that begins a text, where there is one."""
    return tokenizer.encode(prompt) or [i for i in (tokenizer.bos_token_id,) if i is not None]


def tokens_to_generate(prompt: int, settings: CompletionSettings, context: int) -> int:
    """How many tokens may follow a prompt of so many.

    Raises:
        InputError: none, or the prompt is empty.
    """
    check_prompt(prompt, context)
    return min(settings.max_tokens, context - prompt)


def new_decoder(engine: Engine, settings: CompletionSettings, slots: int, capacity: int) -> Decoder:
    return Decoder(engine, slots, capacity, settings.sampling, settings.speculation, settings.alternatives)


def new_answer(engine: Engine, tokenizer: Tokenizer, settings: CompletionSettings) -> Answer:
    ends = frozenset(engine.config.eos_token_ids) | tokenizer.end_token_ids
    return Answer(tokenizer, settings.stop, ends)


def answer_all(
    decoder: Decoder,
    jobs: Sequence[Job],
    answers: Sequence[Answer],
    listen: TextListener,
    keep: bool = False,
) -> Iterator[list[int]]:
    """Give every job's tokens to its answer; after each call of the engine yield what ended with it.

    Args:
        decoder: runs the jobs.
        jobs: what to continue; their `max_tokens` fit the decoder's capacity.
        answers: one of each job.
        listen: called with (job, new text).
        keep: see `Decoder.run`.
    """
    for step in decoder.run(jobs, keep):
        ended: list[int] = []
        for index, token in step:
            answer = answers[index]
            if answer.finish_reason:
                continue  # a guess that came true behind the end
            text = answer.add(token)
            if len(answer.tokens) == jobs[index].max_tokens:
                text += answer.finish()
            if text:
                listen(index, text)
            if answer.finish_reason:
                decoder.end(index)
                ended.append(index)
        yield ended
