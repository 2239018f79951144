"""A conversation as ids, and which of them the assistant says: what chat fine-tuning trains on.

The text is the template's. An answer begins where the template, given the messages before it, hands over to
the assistant, and it ends with the token that ends the turn: so far a model goes by itself, and no further.
It is checked, answer by answer, that the text of the first messages is the beginning of the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smolctl.data.text.conversations import ASSISTANT, Conversation, RowError
from smolctl.data.tokenizer.chat import render_chat
from smolctl.data.tokenizer.prompt import SpecialTokens, any_of
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError

TrainedOn = Literal["assistant", "completion", "all"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Turns:
    """A conversation in tokens.

    Attributes:
        ids: (N,)
        is_trained: (N,) whether a token is trained on; never the first one, which nothing predicts.
    """

    ids: NDArray[np.int64]
    is_trained: NDArray[np.bool_]


@dataclass(frozen=True)
class TurnEncoder:
    """Gives conversations their tokens.

    Args:
        tokenizer: with a chat template.
        loss: what is trained on: all the assistant says; what answers the row's prompt, or the last answer
            where it names none; or everything.
        special_tokens: what those are that a message spells.
    """

    tokenizer: Tokenizer
    loss: TrainedOn = "assistant"
    special_tokens: SpecialTokens = "text"

    def rendered(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text of a conversation, with stand-ins, and the spans in it that are trained on.

        Raises:
            RowError: the template refuses the messages.
            InputError: there is no template, or it writes an answer in another way than it asks for one.
        """
        messages: Sequence[Mapping[str, Any]] = conversation.messages
        if self.special_tokens == "text":
            messages = self.tokenizer.spelled.hide(list(messages))
        text = self._render(messages, asks=False)
        if self.loss == "all":
            return text, [(0, len(text))]
        said = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        if self.loss == "completion":
            first = said[-1] if conversation.completion is None else conversation.completion
            said = [number for number in said if number >= first]
        return text, [self._span(messages, number, text) for number in said]

    def encode(self, conversations: Iterable[Conversation]) -> list[Turns | RowError]:
        """Conversations as tokens, on all cores; of one that cannot be trained on, the reason.

        Raises:
            InputError: as `rendered`.
        """
        found: list[Turns | RowError] = []
        texts: list[tuple[int, str, list[Span]]] = []
        for conversation in conversations:
            try:
                text, spans = self.rendered(conversation)
            except RowError as error:
                found.append(error)
                continue
            texts.append((len(found), text, spans))
            found.append(RowError())  # its place
        encoded = self.tokenizer.spelled.encode_with_places([text for _, text, _ in texts])
        for (place, _, spans), (ids, begins) in zip(texts, encoded, strict=True):
            is_trained = np.zeros(len(ids), dtype=bool)
            for start, end in spans:
                is_trained |= (begins >= start) & (begins < end)
            is_trained[:1] = False
            found[place] = (
                Turns(ids, is_trained) if is_trained.any() else RowError("has no token to train on")
            )
        return found

    def _span(self, messages: Sequence[Mapping[str, Any]], number: int, text: str) -> Span:
        """Where the answer that is message `number` stands in the text of all."""
        asked = self._render(messages[:number], asks=True)
        answered = text if number + 1 == len(messages) else self._render(messages[: number + 1], asks=False)
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise InputError(
                "the chat template writes an answer in another way than it asks for one, or in another way "
                "when more messages follow, so that the tokens of the answer cannot be found",
                "Correct the template, or train on everything: data.loss=all.",
            )
        ends = [match.end() for match in self._ends.finditer(answered, len(asked))]
        if not ends:
            raise InputError(
                "the chat template ends an answer without a token at which a model could stop",
                "Correct the template: an answer must end with the end-of-sequence or end-of-turn token.",
            )
        return len(asked), ends[-1]

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        return re.compile(any_of(self.tokenizer.end_tokens))

    def _render(self, messages: Sequence[Mapping[str, Any]], asks: bool) -> str:
        template = self.tokenizer.chat_template
        if template is None:
            raise InputError("there is no chat template", "Take a model that has one.")
        try:
            return render_chat(template, messages, self.tokenizer.named_tokens, asks)
        except InputError as error:
            raise RowError(error.message) from None
