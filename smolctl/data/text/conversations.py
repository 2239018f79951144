"""Parses rows of data as conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from smolctl.escaping import whole_characters
from smolctl.outside import MAX_DEPTH, json_or_text

# Names of ShareGPT's and similar data for the roles of chat templates.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
ASSISTANT = "assistant"


class Shape(StrEnum):
    """The fields in which a row contains its conversation."""

    MESSAGES = "messages"  # messages: [{role, content}]
    SHAREGPT = "sharegpt"  # conversations: [{from, value}]
    COMPLETION = "completion"  # prompt and completion, each a text or messages
    INSTRUCTION = "instruction"  # instruction, input (may be missing or empty), output


FIELDS = {
    Shape.MESSAGES: ("messages",),
    Shape.SHAREGPT: ("conversations",),
    Shape.COMPLETION: ("prompt", "completion"),
    Shape.INSTRUCTION: ("instruction", "output"),
}


class RowError(ValueError):
    """The reason why a row is not a conversation for training."""


@dataclass(frozen=True)
class Conversation:
    """Messages with the other inputs of a chat template.

    Attributes:
        where: its origin for people: a file and a line.
        shape: of its row.
        messages: `{"role": ..., "content": ...}` each, with their other keys, such as tool_calls.
        tools: functions that the assistant may call, in the template's form.
        completion: number of the first message that answers the row's prompt; None if the row has no prompt
            field.
        group: conversations with the same group are held out together; empty: those with the same text.
    """

    where: str
    shape: Shape
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    completion: int | None = None
    group: str = ""

    @property
    def answers(self) -> list[int]:
        """Numbers of the assistant's messages to train on.

        A message with a `weight` of 0 is excluded, as in OpenAI's fine-tuning.
        """
        return [number for number, message in enumerate(self.messages) if _is_answer(message)]


def shape_of(names: Sequence[str]) -> Shape | None:
    """The shape of rows with these fields; None if it is not supported."""
    return next((shape for shape, fields in FIELDS.items() if set(fields) <= set(names)), None)


def read_conversation(row: Mapping[str, Any], shape: str, where: str) -> Conversation:
    """Parse the conversation of a row.

    Args:
        row: its fields.
        shape: of the row; auto: detected from its fields.
        where: its origin for people.

    Raises:
        RowError: there is none, or none that can be trained on.
    """
    found = shape_of(list(row)) if shape == "auto" else Shape(shape)
    if found is None:
        raise RowError(f"has no conversation: its fields are {', '.join(map(repr, row)) or 'none'}")
    if missing := [field for field in FIELDS[found] if field not in row]:
        raise RowError(f"has no field {missing[0]!r}")
    completion = None
    if found is Shape.MESSAGES:
        messages = _messages(row["messages"], "messages")
    elif found is Shape.SHAREGPT:
        messages = _messages(row["conversations"], "conversations")
        if isinstance(row.get("system"), str) and row["system"]:
            messages = [{"role": "system", "content": row["system"]}, *messages]
    elif found is Shape.COMPLETION:
        prompt = _turns(row["prompt"], "user", "prompt")
        messages, completion = [*prompt, *_turns(row["completion"], ASSISTANT, "completion")], len(prompt)
    else:
        parts = (_text(row[name], name) for name in ("instruction", "input") if row.get(name))
        question = {"role": "user", "content": "\n\n".join(parts)}
        messages = [question, {"role": ASSISTANT, "content": _text(row["output"], "output")}]
    _require_sense(messages)
    tools = _objects(row.get("tools"), "tools")
    group = row.get("group")
    return Conversation(
        where, found, tuple(messages), tuple(tools), completion, group if isinstance(group, str) else ""
    )


def _objects(value: object, name: str) -> list[dict[str, Any]]:
    """Tools or tool calls in the form of templates: a list of objects, which some data stores as JSON
    text.
    """
    objects = json_or_text(value) if isinstance(value, str) else _without_nulls(value)
    if not isinstance(objects or [], list) or not all(isinstance(item, dict) for item in objects or []):
        raise RowError(f"{name!r} is not a list of objects")
    return objects or []


def _without_nulls(value: Any, level: int = 0) -> Any:
    """A value as lists and dicts, without null keys: Parquet gives every object the keys of all objects."""
    if level > MAX_DEPTH:
        raise RowError(f"is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {key: _without_nulls(item, level + 1) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nulls(item, level + 1) for item in value]
    return whole_characters(value) if isinstance(value, str) else value


def _turns(value: object, role: str, name: str) -> list[dict[str, Any]]:
    """A prompt or a completion as messages, with surrounding white space removed, because the template
    adds its own.
    """
    if isinstance(value, str):
        return [{"role": role, "content": whole_characters(value).strip()}]
    return _messages(value, name)


def _messages(value: object, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowError(f"{name!r} is {_a(value)}, not a list of messages")
    if not value:
        raise RowError(f"{name!r} is empty")
    return list(map(_message, value))


def _message(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RowError(f"a message is {_a(value)}, not an object")
    message = _without_nulls(value)
    if calls := _objects(message.pop("tool_calls", None), "tool_calls"):
        message["tool_calls"] = list(map(_call, calls))
    named = message.pop("from", None) if "role" not in message else message.pop("role")
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise RowError(f"unknown role {named!r}" if named is not None else "a message has no role")
    content = message.pop("value", None) if "content" not in message else message.pop("content")
    if content is None and not message.get("tool_calls"):
        raise RowError(f"a message of the {role} has no content")
    return {"role": role, "content": _content(content), **message}


def _call(value: dict[str, Any]) -> dict[str, Any]:
    """A call with an object as arguments, as templates expect; OpenAI's API has them as JSON text."""
    function = value.get("function", value)
    if isinstance(function, dict) and isinstance(spelled := function.get("arguments"), str):
        function = {**function, "arguments": json_or_text(spelled)}
    return {**value, "function": function} if "function" in value else function


def _content(value: object) -> str:
    """A message's text; a list of parts is joined if all of them are text."""
    if value is None:
        return ""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
            raise RowError("a message contains something other than text")
        return whole_characters("".join(part["text"] for part in value))
    return _text(value, "content")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name!r} is {_a(value)}, not text")
    return whole_characters(value)


def _require_sense(messages: Sequence[Mapping[str, Any]]) -> None:
    answers = list(filter(_is_answer, messages))
    if not answers:
        raise RowError("the assistant says nothing")
    if not all(message["content"].strip() or message.get("tool_calls") for message in answers):
        raise RowError("an answer of the assistant is empty")
    if not any(message["role"] == "user" for message in messages):
        raise RowError("the user says nothing")


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message["role"] == ASSISTANT and message.get("weight") != 0


def _a(value: object) -> str:
    kinds = {str: "a text", bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return kinds.get(type(value), "a list" if isinstance(value, Sequence) else "null")
