"""Requests of OpenAI's API, checked before anything runs."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from typing import Any

from smolctl.errors import InputError, SmolError
from smolctl.generation.complete import CompletionSettings
from smolctl.generation.grammar import compile_schema
from smolctl.generation.load import LoadedModel
from smolctl.generation.openai import answer_schema, parse_messages
from smolctl.generation.prompts import (
    OF_SERVERS,
    SAMPLING,
    SETTINGS,
    UNSUPPORTED,
    UnsupportedError,
    changed_settings,
    refuse_constant,
)
from smolctl.generation.sampling import resolve_sampling
from smolctl.generation.service import ServicePrompt
from smolctl.outside import parse_json

COMPLETION_TOKENS = 16  # OpenAI's default for completions; an answer in a chat may fill the context
MOST_LOGPROBS = 20  # OpenAI's limit in a chat
MOST_STOPS, MOST_STOP_CHARACTERS = 16, 1_000
ROLES = ("system", "user", "assistant")  # "developer" is another name for the first
# Settings that `changed_settings` does not handle.
OWN = ("logprobs", "top_logprobs")
# Every parameter that has an effect here, or is refused.
PARAMETERS = (
    *("messages", "prompt", "model", "response_format", "stream_options"),
    *(*SETTINGS, *OWN, *OF_SERVERS, *UNSUPPORTED),
)
# Parameters of other servers that are ignored here, although their names resemble one of those.
IGNORED = (
    *("auto_max_new_tokens", "encoder_repetition_penalty", "frequency_penalty_range", "min_new_tokens"),
    *("mode", "models", "num_predict", "presence_penalty_range", "repetition_penalty_range"),
    *("temperature_last", "top_a", "top_logprobs_num", "typical"),
)
MOST_CHECKED = 100  # names of parameters that are compared with the known ones


class ApiError(Exception):
    """An error response of the server.

    Args:
        status: HTTP status.
        message: one sentence or two for the client's user.
        code: OpenAI's name for the kind of error, if there is one.
        param: the invalid field.
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
    """A valid request.

    Args:
        chat: whether it was sent to chat/completions.
        prompts: its prompts.
        texts: for each prompt the text before its answers, which `echo` requests; else empty.
        logprobs: whether log-probabilities are requested.
        stream: whether the answer is streamed.
        include_usage: whether a stream ends with the token counts.
        only_prompt: whether `max_tokens` was 0, so that no generated token may be returned.
    """

    chat: bool
    prompts: tuple[ServicePrompt, ...]
    texts: tuple[str, ...]
    logprobs: bool
    stream: bool
    include_usage: bool
    only_prompt: bool = False

    @property
    def choices(self) -> list[int]:
        """For every answer, the number of its prompt."""
        return [number for number, one in enumerate(self.prompts) for _ in range(one.settings.samples)]


def parse_body(content: bytes) -> dict[str, Any]:
    """The JSON object in a request's body, without null values.

    Raises:
        ApiError: it is not an object.
    """
    try:
        body = parse_json(content, parse_constant=refuse_constant)
    except ValueError as error:
        raise ApiError(400, f"The body is {str(error).removesuffix('.')}.") from None
    if not isinstance(body, dict):
        raise ApiError(400, "The body is not a JSON object.")
    return {key: value for key, value in body.items() if value is not None}


def parse_request(body: Mapping[str, Any], model: LoadedModel, capacity: int, chat: bool) -> ApiRequest:
    """Parse the request in a body.

    Args:
        body: from `parse_body`.
        model: the model that answers.
        capacity: tokens of a prompt and its answer.
        chat: whether it was sent to chat/completions.

    Raises:
        ApiError: a field is invalid or not supported; names the field.
        InputError: a prompt does not fit, or the chat template refuses it.
    """
    _refuse_mistyped(body)
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
        count = (
            1
            if given is True
            else _number({"logprobs": given} if logprobs else {}, "logprobs", MOST_LOGPROBS)
        )
    settings = replace(settings, alternatives=count)
    decode = model.tokenizer.decode
    return ApiRequest(
        chat,
        tuple(ServicePrompt(ids, settings, echo and logprobs) for ids in prompts),
        tuple(decode(ids, skip_special=False) if echo else "" for ids in prompts),
        logprobs,
        stream,
        bool(options.get("include_usage")),
        only_prompt,
    )


def _refuse_mistyped(body: Mapping[str, Any]) -> None:
    """Refuse a name that is almost that of a parameter. Clients send many other names, which are ignored."""
    unknown = (name for name in body if name not in PARAMETERS and name not in IGNORED and len(name) < 40)
    for name in islice(unknown, MOST_CHECKED):
        if near := get_close_matches(name.lower(), PARAMETERS, 1, 0.8):
            message = f'There is no parameter "{name}". Did you mean "{near[0]}"?'
            raise ApiError(400, message, "unknown_parameter", name)


def _settings(body: Mapping[str, Any], model: LoadedModel, capacity: int, chat: bool) -> CompletionSettings:
    own = {key: body[key] for key in SAMPLING if key in body}
    default = CompletionSettings(capacity if chat else COMPLETION_TOKENS, seed=random.randrange(1 << 31))
    with named():
        settings = changed_settings({key: value for key, value in body.items() if key not in OWN}, default)
        settings = replace(settings, sampling=resolve_sampling(own, model.recommended))
        schema = answer_schema(body.get("response_format"))
    stops = settings.stop
    if len(stops) > MOST_STOPS or any(len(stop) > MOST_STOP_CHARACTERS for stop in stops):
        most = f"at most {MOST_STOPS} texts of at most {MOST_STOP_CHARACTERS:,} characters"
        raise ApiError(400, f'"stop" takes {most}.', param="stop")
    if schema is None:
        return settings
    with named("response_format"):
        return replace(settings, grammar=compile_schema(schema, model.tokenizer, model.engine.config))


def _messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    with named():
        messages = parse_messages(body.get("messages"))
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            name = f"messages[{number}].role"
            raise ApiError(400, f'"{name}" is not one of developer, {", ".join(ROLES)}.', param=name)
    return [{key: message[key] for key in ("role", "content")} for message in messages]


@contextmanager
def named(field: str | None = None) -> Iterator[None]:
    """Make an error about a client's request name the field; without `field`, its message starts with the
    name.
    """
    try:
        yield
    except InputError as error:
        begins = re.match(r'"?([^" ]+)', error.message)
        code = "unsupported_parameter" if isinstance(error, UnsupportedError) else None
        param = field or (begins and begins[1].replace("-", "_"))
        raise ApiError(400, sentences(error), code, param) from None


def sentences(error: SmolError) -> str:
    """An error as sentences for a client's user."""
    message = f"{error.message}. {error.hint}".strip()
    return message[:1].upper() + message[1:]


def _prompts(body: Mapping[str, Any], model: LoadedModel) -> list[Sequence[int]]:
    """Ids of the prompts: "prompt" is a text, a list of texts, token ids, or a list of lists of token ids."""
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
            400,
            f'"prompt" has the token id {unknown[0]}, but the vocabulary has {vocab_size:,} tokens.',
            param="prompt",
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
