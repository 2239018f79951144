"""A conversation as ids, and which of them are the assistant's: the data of chat fine-tuning.

The text is rendered by the template. Some templates enclose the assistant's text in `{% generation %}`
blocks. With others, an answer begins where the template, given the messages before it, ends with the header
of the assistant's turn, and ends with the token that ends the turn: that is what a model generates, and no
more. For each answer it is checked that the text of the first messages is a prefix of the whole text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smolctl.data.text.conversations import ASSISTANT, Conversation, RowError
from smolctl.data.tokenizer.chat import Messages, render_chat
from smolctl.data.tokenizer.prompt import SpecialTokens, any_of
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError

TrainedOn = Literal["assistant", "completion", "all"]
Span = tuple[int, int]
# Remarks about conversations that are trained on anyway.
NO_TOOLS = "The chat template does not render the tools that the row names"
NO_TURN_END = (
    "The chat template's {% generation %} blocks leave out the token that ends a turn. "
    "It is trained on anyway"
)
_GENERATION = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")


@dataclass(frozen=True)
class RenderedTurns:
    """A conversation as text.

    Attributes:
        text: with placeholders for special tokens spelled in messages.
        trained: spans of the text to train on.
        remarks: notes for the user: `NO_TOOLS`, `NO_TURN_END`.
    """

    text: str
    trained: tuple[Span, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turns:
    """A conversation in tokens.

    Attributes:
        ids: (N,)
        is_trained: (N,) whether a token is trained on; never the first one, which is not predicted.
        remarks: as in `RenderedTurns`.
    """

    ids: NDArray[np.int64]
    is_trained: NDArray[np.bool_]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class TurnEncoder:
    """Encodes conversations.

    Args:
        tokenizer: with a chat template.
        loss: what to train on: all of the assistant's text; only the answer to the row's prompt, or the last
            answer if the row names no prompt; or everything.
        special_tokens: how special tokens spelled in a message are read.
    """

    tokenizer: Tokenizer
    loss: TrainedOn = "assistant"
    special_tokens: SpecialTokens = "text"

    def rendered(self, conversation: Conversation) -> RenderedTurns:
        """A conversation as text.

        Raises:
            RowError: the template refuses the messages, or does not render their tool calls.
            InputError: there is no template, or it renders answers differently from its generation prompt.
        """
        messages: Messages = conversation.messages
        tools: Messages = conversation.tools
        if self.special_tokens == "text":
            messages, tools = self.tokenizer.spelled.hide([list(messages), list(tools)])
        text, blocks = self._blocks(messages, tools)
        remarks = [NO_TOOLS] if tools and self._is_text_of(text, messages, ()) else []
        without_calls = [_without(message, "tool_calls") for message in messages]
        if without_calls != list(messages) and self._is_text_of(text, without_calls, tools):
            raise RowError("calls tools, which the chat template does not render")
        if self.loss == "all":
            return RenderedTurns(text, ((0, len(text)),), tuple(remarks))
        said = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        first = said[0]
        if self.loss == "completion":
            first = said[-1] if conversation.completion is None else conversation.completion
        counted = [number for number in conversation.answers if number >= first]
        if not self._has_blocks:
            spans = [self._span(messages, tools, number, text) for number in counted]
            return RenderedTurns(text, tuple(spans), tuple(remarks))
        if len(blocks) == len(said):
            blocks = [block for block, number in zip(blocks, said, strict=True) if number in counted]
        elif len(conversation.answers) < len(said):
            raise RowError(
                "has an answer of weight 0, which requires a chat template that marks every answer"
            )
        elif self.loss == "completion":
            start = self._start(messages[:first], tools, text)
            blocks = [block for block in blocks if block[0] >= start]
        spans = [self._with_turn_end(block, text) for block in blocks]
        if spans and not self._turn_end.search(text, *spans[-1]):
            raise _no_turn_end()
        remarks += [NO_TURN_END] if spans != blocks else []
        return RenderedTurns(text, tuple(spans), tuple(remarks))

    def encode(self, conversations: Iterable[Conversation]) -> list[Turns | RowError]:
        """Conversations as tokens, on all cores; for one that cannot be trained on, the reason.

        Raises:
            InputError: as in `rendered`.
        """
        found: list[Turns | RowError] = []
        rendered: list[tuple[int, RenderedTurns]] = []
        for conversation in conversations:
            try:
                one = self.rendered(conversation)
            except RowError as error:
                found.append(error)
                continue
            rendered.append((len(found), one))
            found.append(RowError())  # placeholder
        encoded = self.tokenizer.spelled.encode_with_places([one.text for _, one in rendered])
        for (place, one), (ids, begins) in zip(rendered, encoded, strict=True):
            is_trained = np.zeros(len(ids), dtype=bool)
            for start, end in one.trained:
                is_trained |= (begins >= start) & (begins < end)
            is_trained[:1] = False
            found[place] = (
                Turns(ids, is_trained, one.remarks)
                if is_trained.any()
                else RowError("has no token to train on")
            )
        return found

    def _blocks(self, messages: Messages, tools: Messages) -> tuple[str, list[Span]]:
        """The text of messages, and the positions of the template's `{% generation %}` blocks in it."""
        pieces = self._render(messages, tools, mark=self._mark).split(self._mark)
        edges = pairwise(accumulate(map(len, pieces), initial=0))
        return "".join(pieces), [edge for number, edge in enumerate(edges) if number % 2]

    def _with_turn_end(self, block: Span, text: str) -> Span:
        """A block with the token that ends the turn, if the block omits that and it comes next."""
        start, end = block
        follows = None if self._turn_end.search(text, start, end) else self._turn_end_next.match(text, end)
        return start, follows.end() if follows else end

    def _start(self, messages: Messages, tools: Messages, text: str) -> int:
        """Start of the answer to messages in the text of more messages."""
        asked = self._render(messages, tools, asks=True)
        if not text.startswith(asked):
            raise _not_found()
        return len(asked)

    def _span(self, messages: Messages, tools: Messages, number: int, text: str) -> Span:
        """The span of the answer that is message `number` in the text of all messages."""
        answered = text
        if number + 1 < len(messages):
            answered = self._render(messages[: number + 1], tools)
        start = self._start(messages[:number], tools, answered)
        if not text.startswith(answered):
            raise _not_found()
        ends = [match.end() for match in self._turn_end.finditer(answered, start)]
        if not ends:
            raise _no_turn_end()
        return start, ends[-1]

    @cached_property
    def _turn_end(self) -> re.Pattern[str]:
        return re.compile(any_of(self.tokenizer.end_tokens))

    @cached_property
    def _turn_end_next(self) -> re.Pattern[str]:
        return re.compile(rf"\s*(?:{any_of(self.tokenizer.end_tokens)})")

    @cached_property
    def _has_blocks(self) -> bool:
        return bool(_GENERATION.search(self.tokenizer.chat_template or ""))

    @cached_property
    def _mark(self) -> str:
        """A mark around blocks; it is random, so that no message can contain it."""
        return secrets.token_hex()

    def _is_text_of(self, text: str, messages: Messages, tools: Messages) -> bool:
        try:
            return self._render(messages, tools) == text
        except RowError:
            return False

    def _render(self, messages: Messages, tools: Messages = (), *, asks: bool = False, mark: str = "") -> str:
        template = self.tokenizer.chat_template
        if template is None:
            raise InputError("there is no chat template", "Use a model that has one.")
        try:
            named = self.tokenizer.named_tokens
            return render_chat(template, messages, named, asks, tools=tools, answer_mark=mark)
        except InputError as error:
            raise RowError(error.message) from None


def _without(message: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != key}


def _not_found() -> InputError:
    return InputError(
        "the chat template renders an answer differently after its own prompt, or when more messages follow, "
        "so the tokens of the answer cannot be found",
        "Correct the template, or train on everything: data.loss=all.",
    )


def _no_turn_end() -> InputError:
    return InputError(
        "the chat template ends an answer without a token that stops the model",
        "Correct the template: an answer must end with the end-of-sequence or end-of-turn token.",
    )
