"""Files of prompts: JSON lines with their own settings, and how many of them an output already answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, TypeGuard

from smolctl.durable import require_writable, writing_alone
from smolctl.errors import InputError, UsageError
from smolctl.escaping import json_text
from smolctl.generation.complete import CompletionSettings
from smolctl.generation.openai import answer_schema, parse_messages
from smolctl.outside import parse_json, path_meant
from smolctl.ownership import require_folder_of

STDIN = "-"
COMPLETIONS = "completions"  # the key of the answers in an output row
CORRECT = "Correct it, or leave it out."
SHAPES = 'Each line is {"prompt": "..."}, {"messages": [...]} or a string.'

# Settings of a line, under OpenAI's names or, if OpenAI has none, vLLM's.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# The field of the settings, its minimum and its maximum (128 as in OpenAI's API).
COUNTS: Mapping[str, tuple[str, int | None, int | None]] = {
    "max_tokens": ("max_tokens", 1, None),
    "max_completion_tokens": ("max_tokens", 1, None),
    "n": ("samples", 1, 128),
    "top_logprobs": ("alternatives", 0, 20),
    "seed": ("seed", None, None),
}
MOST_PROMPTS = 500_000_000  # characters of a file; a device may never end
SETTINGS = (*SAMPLING, *COUNTS, "stop")
# Settings of OpenAI, vLLM, llama.cpp and transformers that would change the answer and that smolctl does not
# support. They have no effect with one of these values, or if they are empty, 0 or false.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *("audio", "do_sample", "frequency_penalty", "functions", "ignore_eos", "logit_bias"),
            *("max_new_tokens", "min_tokens", "n_predict", "num_return_sequences", "prediction"),
            *("presence_penalty", "repeat_penalty", "stop_sequences", "stop_token_ids", "suffix"),
            *("tools", "typical_p", "use_beam_search", "web_search_options"),
        ),
        (),
    ),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "num_beams": (1,),
    "tool_choice": ("none", "auto"),
}
# Settings for servers only; answers to lines always contain log-probabilities.
OF_SERVERS: Mapping[str, tuple[Any, ...]] = {"echo": (), "logprobs": (True,), "stream": ()}


class UnsupportedError(InputError):
    """A setting that smolctl does not have."""


@dataclass(frozen=True)
class PromptLine:
    """A line of a file of prompts."""

    number: int  # in the file, starting at 1
    source: Any  # an object with "prompt" or "messages"; for an invalid line, what it contains
    settings: CompletionSettings
    fault: InputError | None = None  # why the line is not a prompt
    messages: Sequence[Mapping[str, str]] = ()  # of a chat, with one text each
    schema: Mapping[str, Any] | None = None  # that its answers follow

    def row(self, completions: list[dict[str, Any]]) -> dict[str, Any]:
        """The output row with its answers."""
        return {**self.source, COMPLETIONS: completions}

    def fault_row(self, fault: InputError) -> dict[str, Any]:
        """The output row that explains why there is no answer."""
        error = {"code": int(fault.exit_code), "message": fault.message, "hint": fault.hint}
        return {"line": self.number, "input": self.source, "error": error}


@dataclass(frozen=True)
class PromptFile:
    """Prompts of a file of JSON lines."""

    name: str
    lines: tuple[PromptLine, ...]


def read_prompts(name: str, stdin: TextIO, defaults: CompletionSettings) -> PromptFile:
    """Read prompts from JSON lines: objects with "prompt" or "messages", or strings. Empty lines are skipped.

    Args:
        name: path of the file; "-" reads stdin.
        stdin: the stream that "-" reads.
        defaults: settings that apply unless a line sets them.

    Raises:
        InputError: the file cannot be read or has no lines. An error in a line is stored with that line.
    """
    shown = "stdin" if name == STDIN else name
    try:
        if name == STDIN:
            text = read_text(stdin, shown, "Split the file.")
        else:
            with Path(name).open(encoding="utf-8", errors="replace") as file:
                text = read_text(file, shown, "Split the file.")
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        hint = f"{path_meant(Path(name))}Name a file of JSON lines, or '-' for stdin."
        raise InputError(f"{name}: {reason}", hint) from None
    numbered = enumerate(text.removeprefix("\ufeff").split("\n"), start=1)
    lines = tuple(_parse(number, line.strip(), defaults) for number, line in numbered if line.strip())
    if not lines:
        remedy = 'Write one JSON object per line: {"prompt": "..."}.'
        raise InputError(f"{shown}: contains no prompts", remedy)
    return PromptFile(shown, lines)


def read_text(file: TextIO, name: str, remedy: str) -> str:
    """The whole text of a file, which may be a device that never ends.

    Raises:
        InputError: it is longer than `MOST_PROMPTS`.
    """
    text = file.read(MOST_PROMPTS + 1)
    if len(text) > MOST_PROMPTS:
        raise InputError(f"{name}: has more than {MOST_PROMPTS:,} characters", remedy)
    return text


def changed_settings(values: Mapping[str, Any], settings: CompletionSettings) -> CompletionSettings:
    """Settings with the values that `values` overrides; null changes nothing, and other keys are ignored.

    Raises:
        InputError: a value of the wrong type or out of range, or a setting that smolctl does not support.
    """
    given = {key: value for key, value in values.items() if value is not None}
    _refuse_unsupported(given, UNSUPPORTED)
    changes: dict[str, Any] = {
        field: _integer(key, given[key], least, most)
        for key, (field, least, most) in COUNTS.items()
        if key in given
    }
    if "stop" in given:
        stop = [given["stop"]] if isinstance(given["stop"], str) else given["stop"]
        if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
            raise InputError('"stop" is neither a string nor a list of strings', CORRECT)
        changes["stop"] = tuple(stop)
    sampling = {key: given[key] for key in SAMPLING if key in given}
    for key, value in sampling.items():
        if type(value) is not int and (key == "top_k" or type(value) is not float):
            raise InputError(f'"{key}" is not {"an integer" if key == "top_k" else "a number"}', CORRECT)
    try:
        return replace(settings, **changes, sampling=replace(settings.sampling, **sampling))
    except UsageError as error:
        raise InputError(error.message.removeprefix("--"), error.hint) from None


def _integer(key: str, value: object, least: int | None, most: int | None) -> int:
    if type(value) is int and (least is None or value >= least) and (most is None or value <= most):
        return value
    limits = " of 1 or more" if most is None else f" from {least} to {most}"
    raise InputError(f'"{key}" is not an integer{limits if least is not None else ""}', CORRECT)


def _refuse_unsupported(given: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]]) -> None:
    for key, harmless in unsupported.items():
        if (value := given.get(key)) and value not in harmless:
            raise UnsupportedError(
                f'"{key}" is not supported', f"Leave it out. Supported: {', '.join(SETTINGS)}."
            )


def are_messages(value: object) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a value is a non-empty list of {"role": "...", "content": "..."}."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) for one in value)
        and all(isinstance(one.get(key), str) for one in value for key in ("role", "content"))
    )


def finished_lines(file: PromptFile, output: Path) -> int:
    """How many lines of a file have a row in the output of an earlier run, which is truncated after the last
    of them.

    A row that was cut by a kill, and answers that Ctrl-C interrupted, are generated again.

    Raises:
        InputError: the output contains something else, and is not changed; or it cannot be read or written.
        UsageError: its folder is missing.
        DiskError: another process is writing it, or it cannot be written.
    """
    remedy = "Name a file that can be written."
    try:
        require_folder_of(output, remedy)
        require_writable(output if output.exists() else output.parent, remedy)
        content = output.read_bytes() if output.exists() else b""
        *rows, torn = content.split(b"\n")
        if len(rows) + bool(torn) > len(file.lines):
            raise _not_an_output(file, output, len(file.lines) + 1)
        done, ends = 0, [0]
        for number, (row, line) in enumerate(zip(rows, file.lines, strict=False), start=1):
            ends.append(ends[-1] + len(row) + 1)
            try:
                value = parse_json(row)
            except ValueError:
                value = None
            if not isinstance(value, dict) or not _is_row_of(value, line):
                raise _not_an_output(file, output, number)
            reasons = [one.get("finish_reason") for one in value.get(COMPLETIONS, ())]
            if done == number - 1 and "interrupted" not in reasons:
                done = number
        if torn and not any(_begins_alike(torn, head) for head in _heads(file.lines[len(rows)])):
            raise _not_an_output(file, output, len(rows) + 1)
        if len(content) > ends[done]:
            with writing_alone(output, output), output.open("r+b") as stream:
                stream.truncate(ends[done])
    except OSError as error:
        raise InputError(f"{output}: {error.strerror}", remedy) from None
    return done


def _parse(number: int, text: str, defaults: CompletionSettings) -> PromptLine:
    """Parse one line of a file; an error in it is stored with the line."""
    value: Any = text
    try:
        try:
            value = parse_json(text, parse_constant=refuse_constant)
        except ValueError as error:
            raise InputError(str(error), SHAPES) from None
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
            raise InputError('neither a string nor an object with either "prompt" or "messages"', SHAPES)
        if "prompt" in value and not isinstance(value["prompt"], str):
            raise InputError('"prompt" is not a string', SHAPES)
        messages = parse_messages(value["messages"]) if "messages" in value else ()
        if COMPLETIONS in value:
            raise InputError(
                f'it has the key "{COMPLETIONS}", which is reserved for the answers', "Rename that key."
            )
        _refuse_unsupported(value, OF_SERVERS)
        schema = answer_schema(value.get("response_format"))
        settings = changed_settings(value, defaults)
        return PromptLine(number, value, settings, messages=messages, schema=schema)
    except InputError as fault:
        return PromptLine(number, value, defaults, fault)


def refuse_constant(name: str) -> None:
    """Raise for NaN and infinity, which are not JSON."""
    raise ValueError(f"{name} is not a JSON number")


def _is_row_of(row: Mapping[str, Any], line: PromptLine) -> bool:
    if COMPLETIONS in row:
        return bool({key: value for key, value in row.items() if key != COMPLETIONS} == line.source)
    fault = {"line": line.number, "input": line.source}
    return "error" in row and {key: value for key, value in row.items() if key != "error"} == fault


def _heads(line: PromptLine) -> list[bytes]:
    """The possible starts of a line's rows: with answers, and with an error."""
    parts = [line.source, {"line": line.number, "input": line.source}]
    return [json_text(part)[:-1].encode() for part in parts if isinstance(part, dict)]


def _begins_alike(one: bytes, other: bytes) -> bool:
    return one.startswith(other) or other.startswith(one)


def _not_an_output(file: PromptFile, output: Path, number: int) -> InputError:
    return InputError(
        f"{output}: line {number} is not the answer to prompt {number} of {file.name}",
        "Name the output of the same prompts, or a new file.",
    )
