"""Many prompts: read from lines of JSON, continued together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from smolctl.errors import InputError
from smolctl.generation.answer import Completion
from smolctl.generation.complete import (
    CompletionSettings,
    answer_all,
    new_answer,
    new_decoder,
    prompt_ids,
    tokens_to_generate,
)
from smolctl.generation.decode import Job, generator_for
from smolctl.generation.load import LoadedModel

T = TypeVar("T")
R = TypeVar("R")

NAMED_LINES = 3  # faulty lines that an error message spells out


@dataclass(frozen=True)
class Request:
    """One line of the input."""

    line: int  # counted from 1
    fields: Mapping[str, Any]  # the whole object, passed through to the output
    text: str | None  # a prompt, or
    messages: tuple[Mapping[str, str], ...] | None  # a conversation to answer


def read_requests(lines: Sequence[str], name: str) -> list[Request]:
    """Requests of JSON lines: objects with "prompt" or "messages", or bare strings. Empty lines are skipped.

    Args:
        lines: the file's.
        name: of the file, for messages.

    Raises:
        InputError: lines that are no requests, by number; or there is none.
    """
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    requests = _of_every_line(name, numbered, _request)
    if not requests:
        raise InputError(f"{name}: no prompts in it", 'Write one JSON object a line: {"prompt": "..."}.')
    return requests


def complete_many(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    settings: CompletionSettings,
    batch_size: int,
) -> Iterator[tuple[int, tuple[Completion, ...]]]:
    """Continue many prompts together; (index of the prompt, its completions) as they get done.

    `batch_size` sequences decode at once. Each prompt's text is what it would be alone: every sequence has
    its own generator, by the seed, the prompt's index and the number of the sample.

    Args:
        model: continues them.
        prompts: token ids of each, from `tokenize_requests`.
        settings: the same for all.
        batch_size: sequences at once, however many samples a prompt has.

    Raises:
        InputError: a prompt is empty or does not fit the context.
    """
    context = model.engine.config.max_position_embeddings
    counts = [tokens_to_generate(len(ids), settings, context) for ids in prompts]
    places = [(index, sample) for index in range(len(prompts)) for sample in range(settings.samples)]
    jobs = [
        Job(prompts[index], counts[index], generator_for(settings.seed, index, sample))
        for index, sample in places
    ]
    answers = [new_answer(model.engine, model.tokenizer, settings) for _ in jobs]
    capacity = max(len(ids) + count for ids, count in zip(prompts, counts, strict=True))
    decoder = new_decoder(model.engine, settings, min(batch_size, len(jobs)), capacity)
    left = [settings.samples] * len(prompts)
    for ended in answer_all(decoder, jobs, answers, lambda _job, _text: None):
        for job in ended:
            index = places[job][0]
            left[index] -= 1
            if not left[index]:
                own = answers[index * settings.samples : (index + 1) * settings.samples]
                yield index, tuple(answer.completion() for answer in own)


def tokenize_requests(
    model: LoadedModel,
    requests: Sequence[Request],
    render: Callable[[Request], str],
    name: str,
    settings: CompletionSettings,
) -> list[list[int]]:
    """Token ids of every request, checked against the model's context.

    Args:
        model: that will read them.
        requests: from `read_requests`.
        render: a request as the text that the model reads.
        name: of the file, for messages.
        settings: what will be generated.

    Raises:
        InputError: requests that the template refuses or that do not fit, by number of the line.
    """
    context = model.engine.config.max_position_embeddings

    def tokenize(_line: int, request: Request) -> list[int]:
        ids = prompt_ids(model.tokenizer, render(request))
        tokens_to_generate(len(ids), settings, context)
        return ids

    return _of_every_line(name, [(request.line, request) for request in requests], tokenize)


def _request(line: int, text: str) -> Request:
    """One line of the input; raises InputError with what is wrong in it."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"not JSON ({error})") from None
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise InputError('neither a string nor an object with either "prompt" or "messages"')
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise InputError('"prompt" is no string')
        return Request(line, value, value["prompt"], None)
    messages = value["messages"]
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise InputError('"messages" is no list of {"role": "...", "content": "..."}')
    return Request(line, value, None, tuple(messages))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _of_every_line(name: str, numbered: Sequence[tuple[int, T]], convert: Callable[[int, T], R]) -> list[R]:
    """Convert every line, or say which of them cannot be converted."""
    converted, faults = [], []
    for line, value in numbered:
        try:
            converted.append(convert(line, value))
        except InputError as error:
            faults.append((line, error))
    if faults:
        named = "; ".join(f"line {line}: {error.message}" for line, error in faults[:NAMED_LINES])
        more = f"; and {len(faults) - NAMED_LINES} more lines" if len(faults) > NAMED_LINES else ""
        hint = faults[0][1].hint or 'Each line is {"prompt": "..."}, {"messages": [...]} or a string.'
        raise InputError(f"{name}: {named}{more}", hint)
    return converted
