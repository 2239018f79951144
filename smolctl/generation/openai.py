"""Parses the parts of OpenAI's requests that have a form of their own: messages, and the format of an
answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolctl.errors import InputError

LIKE_OPENAI = 'Write {"role": "...", "content": "..."}.'


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """Messages with the role names of chat templates, and with one text each.

    Args:
        value: a list of objects with "role" and "content", which is a text, or a list of parts with text.

    Raises:
        InputError: it has another form, or contains anything but text; the message names the field.
    """
    if not isinstance(value, list) or not value:
        raise InputError('"messages" is not a list of at least one message', LIKE_OPENAI)
    return [_message(f"messages[{number}]", message) for number, message in enumerate(value)]


def answer_schema(response_format: Any) -> Mapping[str, Any] | None:
    """The JSON schema that "response_format" asks for; None: the answer is plain text.

    Raises:
        InputError: it has another form.
    """
    wanted = {} if response_format is None else response_format
    kind = wanted.get("type") if isinstance(wanted, dict) else ""
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = wanted.get("json_schema") if kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise InputError(
            '"response_format" has an unknown form',
            'Write {"type": "text"}, {"type": "json_object"}, or '
            '{"type": "json_schema", "json_schema": {"name": "...", "schema": {...}}}.',
        )
    return schema


def _message(name: str, message: Any) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise InputError(f'"{name}" is not a message with a role', LIKE_OPENAI)
    if message.get("tool_calls") or message.get("function_call"):
        raise InputError(f'"{name}" calls a tool, which is not supported', "Leave it out.")
    content = message.get("content")
    parts = content if isinstance(content, list) else [content or "" if role == "assistant" else content]
    text = "".join(_text(f"{name}.content", part) for part in parts)
    return {**message, "role": "system" if role == "developer" else role, "content": text}


def _text(name: str, part: Any) -> str:
    if isinstance(part, dict):
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            raise InputError(f'"{name}" has a part that is not text', "This model reads text only.")
        part = part.get(kind)
    if not isinstance(part, str):
        raise InputError(f'"{name}" is neither a string nor a list of parts with text', LIKE_OPENAI)
    return part
