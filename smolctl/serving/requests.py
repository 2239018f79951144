"""What a client asks for: the bodies of OpenAI's API, checked before anything runs."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from smolctl.errors import InputError
from smolctl.generation.complete import CompletionSettings
from smolctl.generation.grammar import compile_schema
from smolctl.generation.load import LoadedModel
from smolctl.generation.prompts import SAMPLING, changed_settings, refuse_constant
from smolctl.generation.sampling import settle
from smolctl.generation.service import Asked
from smolctl.outside import parse_json

COMPLETION_TOKENS = 16  # OpenAI's default for completions; an answer in a chat may fill the context
MOST_LOGPROBS = 20  # OpenAI's limit in a chat
MOST_STOPS, MOST_STOP_CHARACTERS = 16, 1_000
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What these fields ask for unless they have one of these values, or are null, empty, 0 or false.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "ignore_eos": (),
    "logit_bias": (),
    "min_tokens": (),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (),
    "stop_token_ids": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "use_beam_search": (),
    "web_search_options": (),
}
OWN = (
    "echo",
    "logprobs",
    "response_format",
    "stream",
    "top_logprobs",
)  # what `changed_settings` leaves to us


class ApiError(Exception):
    """An answer of the server that is an error.

    Args:
        status: of HTTP.
        message: one sentence or two for the client's user.
        code: OpenAI's name for the kind of error, where it has one.
        param: the field that is wrong.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kinds = {401: "authentication_error", 403: "permission_error", 503: "overloaded_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ApiRequest:
    """A request that can run.

    Args:
        chat: whether it came to chat/completions.
        asked: its prompts.
        texts: what comes before the answers to each prompt, which `echo` asks for; else empty.
        logprobs: whether log-probabilities are part of the answer.
        stream: whether the answer comes in pieces.
        include_usage: whether a stream ends with the numbers of tokens.
        only_prompt: whether `max_tokens` was 0, which a chosen token must not show.
    """

    chat: bool
    asked: tuple[Asked, ...]
    texts: tuple[str, ...]
    logprobs: bool
    stream: bool
    include_usage: bool
    only_prompt: bool = False

    @property
    def choices(self) -> list[int]:
        """The number of its prompt for every answer."""
        return [number for number, one in enumerate(self.asked) for _ in range(one.settings.samples)]


def parse_body(content: bytes) -> dict[str, Any]:
    """The object in a request's body, without what is null.

    Raises:
        ApiError: there is none.
    """
    try:
        body = parse_json(content, parse_constant=refuse_constant)
    except ValueError as error:
        raise ApiError(400, f"The body is {str(error).removesuffix('.')}.") from None
    if not isinstance(body, dict):
        raise ApiError(400, "The body is not a JSON object.")
    return {key: value for key, value in body.items() if value is not None}


def parse_request(body: Mapping[str, Any], model: LoadedModel, capacity: int, chat: bool) -> ApiRequest:
    """What a body asks a model for.

    Args:
        body: from `parse_body`.
        model: answers.
        capacity: tokens of a prompt and its answer.
        chat: whether it came to chat/completions.

    Raises:
        ApiError: something in it is wrong or not supported, named.
        InputError: a prompt does not fit, or the chat template refuses it.
    """
    for field, harmless in UNSUPPORTED.items():
        if (value := body.get(field)) and value not in harmless:
            raise ApiError(400, f'"{field}" is not supported by this server.', "unsupported_parameter", field)
    stream, echo = _flag(body, "stream"), not chat and _flag(body, "echo")
    options = _typed(body, "stream_options", dict, "an object", {})
    only_prompt = echo and body.get("max_tokens") == 0
    settings = _settings({**body, "max_tokens": 1} if only_prompt else body, model, capacity, chat)
    if chat:
        prompts: list[Sequence[int]] = [model.chat_prompt(_messages(body)).ids]
        count = _number(body, "top_logprobs", MOST_LOGPROBS)
        logprobs = _flag(body, "logprobs")
        if count and not logprobs:
            raise ApiError(400, '"top_logprobs" needs "logprobs": true.', param="top_logprobs")
    else:
        prompts = _prompts(body, model)
        given = body.get("logprobs")
        logprobs = given is not None and given is not False
        count = 1 if given is True else _number({"logprobs": given or 0}, "logprobs", MOST_LOGPROBS)
    settings = replace(settings, alternatives=count)
    decode = model.tokenizer.decode
    return ApiRequest(
        chat,
        tuple(Asked(ids, settings, echo and logprobs) for ids in prompts),
        tuple(decode(ids, skip_special=False) if echo else "" for ids in prompts),
        logprobs,
        stream,
        bool(options.get("include_usage")),
        only_prompt,
    )


def _settings(body: Mapping[str, Any], model: LoadedModel, capacity: int, chat: bool) -> CompletionSettings:
    own = {key: body[key] for key in SAMPLING if key in body}
    default = CompletionSettings(capacity if chat else COMPLETION_TOKENS, seed=random.randrange(1 << 31))
    known = {key: value for key, value in body.items() if key not in OWN and key not in UNSUPPORTED}
    try:
        settings = changed_settings(known, default)
        settings = replace(settings, sampling=settle(own, model.recommended))
    except InputError as error:
        named = re.match(r'"?([\w-]+)', error.message)
        field = named[1].replace("-", "_") if named else None
        raise ApiError(400, f"{error.message}. {error.hint}", param=field) from None
    stops = settings.stop
    if len(stops) > MOST_STOPS or any(len(stop) > MOST_STOP_CHARACTERS for stop in stops):
        most = f"at most {MOST_STOPS} texts of at most {MOST_STOP_CHARACTERS:,} characters"
        raise ApiError(400, f'"stop" takes {most}.', param="stop")
    if (schema := _schema(body)) is None:
        return settings
    try:
        grammar = compile_schema(schema, model.tokenizer, model.engine.config)
    except InputError as error:
        raise ApiError(400, f"{error.message}. {error.hint}", param="response_format") from None
    return replace(settings, grammar=grammar)


def _schema(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The JSON schema that answers must keep to; None: they are plain text."""
    wanted = _typed(body, "response_format", dict, "an object", {})
    kind = wanted.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = wanted.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict):
        raise ApiError(
            400,
            '"response_format" is neither {"type": "text"} nor {"type": "json_object"} nor '
            '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}.',
            param="response_format",
        )
    return schema


def _messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, '"messages" is not a list with a message in it.', param="messages")
    return [_message(f"messages[{number}]", message) for number, message in enumerate(messages)]


def _message(name: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(400, f'"{name}" is not an object.', param=name)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(400, f'"{name}.role" is not one of {", ".join(ROLES)}.', param=f"{name}.role")
    if message.get("tool_calls") or message.get("function_call"):
        raise ApiError(400, f'"{name}" calls a tool, which is not supported.', "unsupported_parameter", name)
    parts = content if isinstance(content, list) else [content or "" if role == "assistant" else content]
    return {"role": ROLES[role], "content": "".join(_text(f"{name}.content", part) for part in parts)}


def _text(name: str, part: Any) -> str:
    if isinstance(part, dict):
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            raise ApiError(
                400, f'"{name}" has a part that is no text, which this model cannot read.', param=name
            )
        part = part.get(kind)
    if not isinstance(part, str):
        raise ApiError(400, f'"{name}" is neither a string nor a list of parts with text.', param=name)
    return part


def _prompts(body: Mapping[str, Any], model: LoadedModel) -> list[Sequence[int]]:
    """Ids of the prompts: "prompt" is a text, a list of texts, token ids, or a list of lists of these."""
    given = body.get("prompt")
    many = given if isinstance(given, list) and not _are_ids(given) else [given]
    if not many:
        raise ApiError(400, '"prompt" is empty.', param="prompt")
    return [_ids(one, model) for one in many]


def _ids(prompt: Any, model: LoadedModel) -> Sequence[int]:
    if isinstance(prompt, str):
        return model.prompt(prompt).ids
    if not _are_ids(prompt):
        raise ApiError(400, '"prompt" is neither text nor token ids, nor a list of these.', param="prompt")
    vocab_size = model.engine.config.vocab_size
    if unknown := [one for one in prompt if not 0 <= one < vocab_size]:
        raise ApiError(
            400, f'"prompt" has the token id {unknown[0]}, and there are {vocab_size:,}.', param="prompt"
        )
    return list(prompt)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _typed(body: Mapping[str, Any], field: str, kind: type, spelled: str, default: Any) -> Any:
    value = body.get(field, default)
    if type(value) is not kind:
        raise ApiError(400, f'"{field}" is not {spelled}.', param=field)
    return value


def _flag(body: Mapping[str, Any], field: str) -> bool:
    return bool(_typed(body, field, bool, "true or false", False))


def _number(body: Mapping[str, Any], field: str, most: int) -> int:
    value = _typed(body, field, int, "an integer", 0)
    if not 0 <= value <= most:
        raise ApiError(400, f'"{field}" is not an integer from 0 to {most}.', param=field)
    return int(value)
