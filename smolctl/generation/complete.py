"""Continues a prompt, text to text, and times it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from smolctl.data.tokenizer.prompt import Prompt
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.generation.answer import Answer, Completion
from smolctl.generation.engine import Cancellation, Engine
from smolctl.generation.grammar import Grammar
from smolctl.generation.sampling import SamplingSettings, generator_for
from smolctl.generation.scheduler import Reuse, Scheduler, Speculation
from smolctl.generation.slots import Request, check_prompt


@dataclass(frozen=True)
class CompletionSettings:
    """What to generate and where to stop."""

    max_tokens: int = 128
    samples: int = 1  # completions per prompt
    stop: tuple[str, ...] = ()  # texts that end a completion and are not part of it
    seed: int = 0
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    speculation: Speculation = "auto"
    alternatives: int = 0  # how many of the likeliest other tokens to report with each token
    grammar: Grammar | None = None  # of a JSON schema that every answer follows

    def request(
        self, prompt: Sequence[int], room: int, sample: int, number: int = 0, score: bool = False
    ) -> Request:
        """The scheduler's request for one of the samples.

        Args:
            prompt: token ids.
            room: maximum tokens of an answer.
            sample: its number; each sample draws its own tokens.
            number: of the prompt; a different number draws different tokens with the same seed.
            score: see `Request`.
        """
        return Request(
            prompt,
            min(self.max_tokens, room),
            generator_for(self.seed, number, sample),
            self.sampling,
            self.alternatives,
            score,
            self.grammar.constraint() if self.grammar else None,
        )


@dataclass(frozen=True)
class Timing:
    """How long each part took."""

    prompt_tokens: int
    reused_tokens: int  # of the prompt: already in the cache
    first_token_s: float  # prefill and the choice of the first token
    prefill_tokens_per_s: float  # over the prompt tokens that were processed
    decode_tokens_per_s: float | None  # over all samples; None if only one token was generated
    decode_steps: int  # calls of the engine after the prompt
    guessed_tokens: int  # draft tokens that the engine checked
    accepted_tokens: int  # draft tokens that equal the model's choice


@dataclass(frozen=True)
class CompletionResult:
    """All completions of one prompt by one model."""

    prompt: str
    completions: tuple[Completion, ...]
    timing: Timing


class InterruptedCompletion(KeyboardInterrupt):
    """Ctrl-C during generation.

    Args:
        result: the text until then; an unfinished answer has the finish reason "interrupted".
    """

    def __init__(self, result: CompletionResult) -> None:
        super().__init__()
        self.result = result


@dataclass(frozen=True)
class Continuation:
    """A prompt and how to continue it."""

    ids: Sequence[int]
    settings: CompletionSettings
    number: int = 0  # a different number draws different tokens with the same seed


# Called with (sample, new text) as soon as the text cannot change any more.
TextListener = Callable[[int, str], None]


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Prompt,
    settings: CompletionSettings,
    on_text: TextListener | None = None,
    scheduler: Scheduler | None = None,
    turn: int = 0,
    cancellation: Cancellation | None = None,
) -> CompletionResult:
    """Continue a prompt `settings.samples` times, and stream text as it becomes final.

    Args:
        engine: the model.
        tokenizer: the model's own.
        prompt: the encoded text or conversation.
        settings: lengths, stop texts, seed and sampling.
        on_text: called with every piece of text, in order for each sample.
        scheduler: of an earlier call with the same settings; prompt tokens in its cache are not processed
            again.
        turn: a different number draws different tokens with the same seed.
        cancellation: lets another thread stop this call.

    Raises:
        InputError: the prompt is empty or does not fit the context.
        CancelledError: `cancellation` was set, or another call with this scheduler began.
        InterruptedCompletion: Ctrl-C; contains the text until then.
    """
    context = scheduler.capacity if scheduler else engine.config.max_position_embeddings
    generation = Generation(engine, tokenizer, [Continuation(prompt.ids, settings, turn)], context)
    started = time.perf_counter()
    scheduler = scheduler or generation.scheduler(settings.samples)
    first_at, interrupted = None, False
    try:
        for _ in generation.run(scheduler, on_text, cancellation):
            first_at = first_at or time.perf_counter()
    except KeyboardInterrupt:
        interrupted = True
        generation.interrupt(on_text)
    ended = time.perf_counter()
    first_at = first_at or ended
    done = scheduler.counts
    later = sum(max(len(answer.tokens) - 1, 0) for answer in generation.answers)
    timing = Timing(
        prompt_tokens=len(prompt.ids),
        reused_tokens=max(len(prompt.ids) - done.prefilled, 0),  # a one-token prompt counts per sample
        first_token_s=first_at - started,
        prefill_tokens_per_s=done.prefilled / (first_at - started),
        decode_tokens_per_s=later / (ended - first_at) if later else None,
        decode_steps=done.steps,
        guessed_tokens=done.drafted,
        accepted_tokens=done.accepted,
    )
    result = CompletionResult(prompt.text, generation.completions(0), timing)
    if interrupted:
        raise InterruptedCompletion(result)
    return result


def new_scheduler(
    engine: Engine, settings: CompletionSettings, slots: int, capacity: int, reuse: Reuse = "exact"
) -> Scheduler:
    """A scheduler with the sampling and speculation of these settings; other arguments as in `Scheduler`."""
    return Scheduler(engine, slots, capacity, settings.sampling, settings.speculation, reuse)


class Generation:
    """Prompts with their answers, as many for each as its settings say, which are generated together.

    Every sequence has its own random generator, seeded by the seed and the numbers of its prompt and sample,
    so its text does not depend on the other sequences.

    Args:
        engine: the model.
        tokenizer: the model's own.
        prompts: one or more; the first one's setting for speculation applies.
        context: maximum tokens of a sequence, prompt included.

    Raises:
        InputError: a prompt is empty or leaves no room in the context.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Continuation], context: int
    ) -> None:
        self._engine, self._settings = engine, prompts[0].settings
        ends = tokenizer.stop_token_ids(engine.config)
        self.answers: list[Answer] = []
        self._requests: list[Request] = []
        self._prompt_of: list[int] = []  # for each sequence
        self._sequences: list[range] = []  # for each prompt
        for index, prompt in enumerate(prompts):
            check_prompt(len(prompt.ids), context)
            settings, room = prompt.settings, context - len(prompt.ids)
            self._sequences.append(range(len(self.answers), len(self.answers) + settings.samples))
            for sample in range(settings.samples):
                self._requests.append(settings.request(prompt.ids, room, sample, prompt.number))
                self.answers.append(Answer(tokenizer, prompt.ids, settings.stop, ends))
                self._prompt_of.append(index)

    def scheduler(self, slots: int) -> Scheduler:
        """A scheduler with room for all prompts and answers, of which at most `slots` decode at the same
        time.
        """
        capacity = max(len(request.prompt) + request.max_tokens for request in self._requests)
        return new_scheduler(self._engine, self._settings, min(slots, len(self._requests)), capacity)

    def run(
        self,
        scheduler: Scheduler,
        on_text: TextListener | None = None,
        cancellation: Cancellation | None = None,
    ) -> Iterator[list[int]]:
        """Yield, after each call of the engine, the numbers of the prompts whose last answer ended with it.

        Args:
            scheduler: runs the sequences.
            on_text: called with (number of the sequence, new text).
            cancellation: see `Scheduler.run`.
        """
        for step in scheduler.run(self._requests, cancellation):
            ended: set[int] = set()
            for index, token in step:
                answer, request = self.answers[index], self._requests[index]
                if answer.finish_reason:
                    continue  # an accepted draft token after the end
                text = answer.add(token)
                if len(answer.tokens) == request.max_tokens:
                    text += answer.finish()
                if text and on_text:
                    on_text(index, text)
                if answer.finish_reason:
                    scheduler.end(request)
                    ended.add(self._prompt_of[index])
            yield [prompt for prompt in ended if all(answer.finish_reason for answer in self._of(prompt))]

    def completions(self, prompt: int) -> tuple[Completion, ...]:
        """The answers to a prompt, by its number from 0."""
        return tuple(answer.completion() for answer in self._of(prompt))

    def interrupt(self, on_text: TextListener | None = None) -> None:
        """End the unfinished answers, and pass on the text that was held back."""
        for index, answer in enumerate(self.answers):
            text = answer.finish("interrupted")
            if text and on_text:
                on_text(index, text)

    def _of(self, prompt: int) -> list[Answer]:
        return [self.answers[index] for index in self._sequences[prompt]]
