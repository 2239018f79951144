"""Many prompts: read from lines of JSON, continued together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from smolctl.errors import InputError
from smolctl.generation.answer import Completion
from smolctl.generation.complete import CompletionSettings, Generation
from smolctl.generation.conversation import Conversation
from smolctl.generation.load import LoadedModel
from smolctl.generation.scheduler import check_prompt

T = TypeVar("T")
R = TypeVar("R")

NAMED_LINES = 3  # faulty lines that an error message names
STDIN = "-"


@dataclass(frozen=True)
class PromptFile:
    """Prompts of a file of JSON lines."""

    name: str
    lines: Mapping[int, Mapping[str, Any]]  # by number from 1: an object with either "prompt" or "messages"


@dataclass(frozen=True)
class Batch:
    """Prompts and their completions, which are computed while they are iterated over."""

    prompts: tuple[Mapping[str, Any], ...]  # the objects of the file, with all their fields
    completions: Iterator[tuple[int, tuple[Completion, ...]]]  # (index of the prompt, its completions)


def read_prompts(name: str, stdin: TextIO) -> PromptFile:
    """The prompts of JSON lines: objects with "prompt" or "messages", or strings. Empty lines are skipped.

    Args:
        name: of the file; "-" reads stdin.
        stdin: what "-" reads.

    Raises:
        InputError: it cannot be read or has no prompts; lines that are not prompts, by number.
    """
    try:
        text = stdin.read() if name == STDIN else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{name}: {reason}", "Name a file of JSON lines, or '-' for stdin.") from None
    name = "stdin" if name == STDIN else name
    lines = {number: line for number, line in enumerate(text.split("\n"), start=1) if line.strip()}
    if not lines:
        raise InputError(f"{name}: no prompts in it", 'Write one JSON object a line: {"prompt": "..."}.')
    return PromptFile(name, _convert_lines(name, lines, _parse))


def complete_many(
    model: LoadedModel,
    file: PromptFile,
    conversation: Conversation,
    settings: CompletionSettings,
    batch_size: int,
) -> Batch:
    """Continue the prompts of a file together; each text is what it would be alone.

    Args:
        model: continues them.
        file: the prompts.
        conversation: how a prompt and messages become the text that the model reads.
        settings: the same for all.
        batch_size: sequences that decode at once, however many samples a prompt has.

    Raises:
        InputError: prompts that the template refuses or that do not fit the context, by number of the line.
    """
    context = model.engine.config.max_position_embeddings

    def tokenize(line: Mapping[str, Any]) -> Sequence[int]:
        chat = "messages" in line
        prompt = (
            conversation.render(model, line["messages"])
            if chat
            else conversation.prompt(model, line["prompt"])
        )
        check_prompt(len(prompt.ids), context)
        return prompt.ids

    prompts = _convert_lines(file.name, file.lines, tokenize)
    generation = Generation(model.engine, model.tokenizer, [*prompts.values()], settings, context)
    ended = (index for step in generation.run(generation.scheduler(batch_size)) for index in step)
    return Batch(tuple(file.lines.values()), ((index, generation.completions(index)) for index in ended))


def _parse(text: str) -> Mapping[str, Any]:
    """One line of a file; raises InputError with what is wrong in it."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"not JSON ({error})") from None
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise InputError('neither a string nor an object with either "prompt" or "messages"')
    if "prompt" in value and not isinstance(value["prompt"], str):
        raise InputError('"prompt" is not a string')
    if "messages" in value and not _are_messages(value["messages"]):
        raise InputError('"messages" is not a list of {"role": "...", "content": "..."}')
    return value


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) for one in value)
        and all(isinstance(one.get(key), str) for one in value for key in ("role", "content"))
    )


def _convert_lines(name: str, lines: Mapping[int, T], convert: Callable[[T], R]) -> dict[int, R]:
    """Convert every line, or name the lines that cannot be converted."""
    converted: dict[int, R] = {}
    faults: list[tuple[int, InputError]] = []
    for number, line in lines.items():
        try:
            converted[number] = convert(line)
        except InputError as error:
            faults.append((number, error))
    if faults:
        named = "; ".join(f"line {number}: {error.message}" for number, error in faults[:NAMED_LINES])
        more = f"; and {len(faults) - NAMED_LINES} more lines" if len(faults) > NAMED_LINES else ""
        hint = faults[0][1].hint or 'Each line is {"prompt": "..."}, {"messages": [...]} or a string.'
        raise InputError(f"{name}: {named}{more}", hint)
    return converted
