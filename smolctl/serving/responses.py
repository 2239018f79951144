"""Answers in OpenAI's format, complete or streamed."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator
from typing import Any

from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.generation.answer import spell
from smolctl.generation.service import Piece
from smolctl.generation.slots import Token
from smolctl.serving.requests import ApiRequest

IMPOSSIBLE = -9999.0  # OpenAI's log-probability of a token that is too unlikely


class Responder:
    """Converts pieces to the chunks of a stream and to a complete answer.

    Args:
        request: the request to answer.
        model: its name.
        tokenizer: the model's own.
    """

    def __init__(self, request: ApiRequest, model: str, tokenizer: Tokenizer) -> None:
        self._request = request
        self._choices = [_Choice(request, number, tokenizer) for number in request.choices]
        self._object = "chat.completion" if request.chat else "text_completion"
        prefix = "chatcmpl" if request.chat else "cmpl"
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._generated = 0

    @property
    def done(self) -> bool:
        """Whether every answer has ended."""
        return all(choice.finish_reason for choice in self._choices)

    def whole(self) -> dict[str, Any]:
        """The complete answer, after all pieces were added."""
        choices = [
            {
                "index": number,
                **(
                    {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                    if self._request.chat
                    else {"text": choice.echoed + choice.text}
                ),
                "logprobs": choice.logprobs(),
                "finish_reason": choice.finish_reason,
            }
            for number, choice in enumerate(self._choices)
        ]
        return {**self._head, "object": self._object, "choices": choices, "usage": self._usage()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks before the first piece: the role of each answer in a chat, or an echoed prompt."""
        for number, choice in enumerate(self._choices):
            if self._request.chat:
                yield self._chunk(number, {"role": "assistant", "content": ""})
            elif choice.echoed:
                yield self._chunk(number, choice.echoed)

    def add(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Add the next piece and return its chunks, none if no text became final."""
        choice, is_chat = self._choices[piece.choice], self._request.chat
        self._generated += not piece.token.of_prompt
        before = len(choice.ids)
        if piece.token.of_prompt or not self._request.only_prompt:
            choice.add(piece)
        logprobs = choice.logprobs(before)
        text = choice.take()
        if text or logprobs:
            yield self._chunk(piece.choice, {"content": text} if is_chat else text, logprobs)
        if piece.finish_reason:
            choice.finish_reason = piece.finish_reason
            yield self._chunk(piece.choice, {} if is_chat else "", None, piece.finish_reason)

    def closing(self) -> Iterator[dict[str, Any]]:
        """Chunks after the last piece: the token counts, if requested."""
        if self._request.include_usage:
            yield {**self._chunk(0, ""), "choices": [], "usage": self._usage()}

    def _chunk(
        self, number: int, content: Any, logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        name = "delta" if self._request.chat else "text"
        choice = {"index": number, name: content, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._request.include_usage else {}
        kind = f"{self._object}.chunk" if self._request.chat else self._object
        return {**self._head, "object": kind, "choices": [choice], **usage}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(one.ids) for one in self._request.prompts)
        done = 0 if self._request.only_prompt else self._generated
        return {"prompt_tokens": prompt, "completion_tokens": done, "total_tokens": prompt + done}


class _Choice:
    """One answer while it is generated."""

    def __init__(self, request: ApiRequest, prompt: int, tokenizer: Tokenizer) -> None:
        given = request.prompts[prompt]
        self.text, self.finish_reason = "", ""
        self.echoed = request.texts[prompt]
        self._taken = 0  # characters of the text already sent in chunks
        self._has_logprobs, self._is_chat, self._tokenizer = request.logprobs, request.chat, tokenizer
        self._tokens: list[Token | None] = []  # None: a prompt's first token, which has no probability
        self.ids: list[int] = []
        self._offsets: list[int] = []  # start of each token in the returned text, in characters
        self._stream = tokenizer.stream(() if given.score else given.ids, skip_special=False)
        self._length = 0 if given.score else len(self.echoed)
        if given.score:
            self._append(None, given.ids[0])

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        if self._has_logprobs:
            self._append(piece.token, piece.token.id)

    def take(self) -> str:
        """The text that was not yet sent in a chunk."""
        before, self._taken = self._taken, len(self.text)
        return self.text[before:]

    def _append(self, token: Token | None, id: int) -> None:
        self._tokens.append(token)
        self.ids.append(id)
        self._offsets.append(self._length)
        self._length += len(self._stream.feed(id))

    def logprobs(self, start: int = 0) -> dict[str, Any] | None:
        """Log-probabilities in OpenAI's format from a token on; None if not requested, or if there are
        none.
        """
        tokens = self._tokens[start:]
        if self._is_chat:
            return {"content": [self._described(token) for token in tokens if token]} if tokens else None
        if start == 1 and self._tokens[0] is None:  # the first token is sent with the second
            start, tokens = 0, self._tokens
        return (
            {
                "tokens": [spell(self._tokenizer, id) for id in self.ids[start:]],
                "token_logprobs": [token and token.logprob for token in tokens],
                "top_logprobs": [token and self._top(token) for token in tokens],
                "text_offset": self._offsets[start:],
            }
            if tokens
            else None
        )

    def _top(self, token: Token) -> dict[str, float]:
        """The likeliest tokens by their text, including the chosen one, whatever its rank."""
        top = {spell(self._tokenizer, token.id): token.logprob}
        for id, probability in token.alternatives:
            top.setdefault(spell(self._tokenizer, id), _log(probability))
        return top

    def _described(self, token: Token) -> dict[str, Any]:
        """A token in the chat format, with the likeliest tokens at its place, which may include the chosen
        one.
        """
        place = [(token.id, token.logprob), *((id, _log(share)) for id, share in token.alternatives)]
        place.sort(key=lambda one: -one[1])
        top = [self._one(*one) for one in place[: len(token.alternatives)]]
        return {**self._one(token.id, token.logprob), "top_logprobs": top}

    def _one(self, id: int, logprob: float) -> dict[str, Any]:
        spelled = self._tokenizer.bytes_of(id)
        return {"token": spell(self._tokenizer, id), "logprob": logprob, "bytes": list(spelled or b"")}


def _log(probability: float) -> float:
    return math.log(probability) if probability else IMPOSSIBLE
