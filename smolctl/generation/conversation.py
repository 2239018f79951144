"""Consecutive prompts: independent, or as turns of a chat."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smolctl.data.tokenizer.prompt import Prompt, SpecialTokens
from smolctl.durable import write_json
from smolctl.errors import InputError, PromptTooLongError
from smolctl.generation.complete import (
    CompletionResult,
    CompletionSettings,
    InterruptedCompletion,
    TextListener,
    complete,
    new_scheduler,
)
from smolctl.generation.load import LoadedModel
from smolctl.generation.prompts import are_messages, changed_settings
from smolctl.generation.slots import check_prompt
from smolctl.outside import read_json

# A session holds at most this many tokens, even if the model's context is longer, because its cache is
# allocated at the start.
MOST_TOKENS = 8192
# When the context is full, the oldest turns are dropped until this share of it is free: the turns after them
# must be processed again, which should not happen at every turn.
FREE_SHARE = 0.25


@dataclass
class Conversation:
    """The turns so far. Without `chat`, a prompt is plain text and nothing is remembered."""

    chat: bool
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    special_tokens: SpecialTokens = "text"  # how special tokens spelled in a message are read

    def prompt(self, model: LoadedModel, text: str) -> Prompt:
        """The prompt with which the model answers `text`.

        Raises:
            InputError: `chat` is set and the model has no chat template.
            PromptTooLongError: the prompt cannot fit the context.
        """
        if not self.chat:
            return model.prompt(text)
        return self.render(model, [*self.turns, {"role": "user", "content": text}])

    def render(self, model: LoadedModel, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """Render messages with the model's template, with the system message first unless they contain their
        own.

        Raises:
            InputError: the model has no chat template, or it refuses the messages.
        """
        own = messages[0]["role"] == "system"
        first = [{"role": "system", "content": self.system}] if self.system and not own else []
        return model.chat_prompt([*first, *messages], self.special_tokens)

    def remember(self, text: str, answer: str) -> None:
        """Add a turn of the user and one of the model."""
        if self.chat:
            self.turns.append({"role": "user", "content": text})
            self.turns.append({"role": "assistant", "content": answer})

    def save(self, path: Path) -> None:
        """Write the messages as an object that `/load` reads and that can be a line of `--jsonl`."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        write_json(path, {"messages": [*first, *self.turns]})

    def make_room(self, model: LoadedModel, text: str, capacity: int, max_tokens: int) -> int:
        """Drop the oldest turns until `text` and its answer fit.

        Args:
            model: provides template and tokenizer.
            text: the next prompt.
            capacity: tokens of a conversation.
            max_tokens: of the answer; at most half of the capacity is kept free for it.

        Returns:
            Number of turns dropped.

        Raises:
            PromptTooLongError: even the text alone does not fit. Then nothing is dropped.
        """
        free = min(max_tokens, capacity // 2)

        def length(forgotten: int) -> int:
            return len(replace(self, turns=self.turns[2 * forgotten :]).prompt(model, text).ids)

        def fits(forgotten: int) -> bool:
            try:
                return length(forgotten) + free <= capacity
            except PromptTooLongError:
                return False

        forgotten = 0
        if not fits(0):
            free = max(free, int(capacity * FREE_SHARE))
            every = (len(self.turns) + 1) // 2
            # Binary search: a conversation of a thousand turns must not be tokenized a thousand times.
            forgotten = bisect_left(range(every), True, lo=min(1, every), key=fits)
            if forgotten == every:
                check_prompt(length(every), capacity)
        self.turns = self.turns[2 * forgotten :]
        return forgotten


class Session:
    """A conversation that keeps its KV cache, so that each turn prefills only its new tokens.

    Args:
        model: answers.
        settings: of the answers; if they ask for several samples, the first one is remembered.
        conversation: may already have turns.
    """

    def __init__(self, model: LoadedModel, settings: CompletionSettings, conversation: Conversation) -> None:
        self.model, self.settings, self.conversation = model, settings, conversation
        self.capacity = min(model.engine.config.max_position_embeddings, MOST_TOKENS)
        self.scheduler = new_scheduler(model.engine, settings, settings.samples, self.capacity, "all")
        self.answers = 0
        self.question: str | None = None  # the latest question

    def make_room(self, text: str) -> int:
        """See `Conversation.make_room`."""
        return self.conversation.make_room(self.model, text, self.capacity, self.settings.max_tokens)

    def change(self, values: Mapping[str, Any]) -> None:
        """Change settings, using the names of the JSON settings of a line of `--jsonl`.

        Raises:
            InputError: a name or a value that is not valid.
        """
        settings = changed_settings(values, self.settings)
        if settings.samples != self.settings.samples:
            raise InputError("the number of answers is fixed when a session begins", "Begin one with -n.")
        self.settings = settings

    def load(self, path: Path) -> None:
        """Continue a conversation that `Conversation.save` wrote, with its system message.

        Raises:
            InputError: it cannot be read, or is not a conversation.
        """
        messages = read_json(path, "Name a file that /save has written.").get("messages")
        start = int(are_messages(messages) and messages[0]["role"] == "system")
        roles = [one["role"] for one in messages[start:]] if are_messages(messages) else ["?"]
        if not are_messages(messages) or roles != ["user", "assistant"] * (len(roles) // 2):
            raise InputError(
                f"{path}: not a conversation of a user and an assistant",
                "Name a file that /save has written.",
            )
        self.conversation.system = messages[0]["content"] if start else None
        self.conversation.turns = messages[start:]
        self.question = messages[-2]["content"] if roles else None

    def retry(self, on_text: TextListener) -> CompletionResult:
        """Replace the answer to the latest question by a new one with different random tokens.

        Raises:
            InputError: there is no question yet.
            InterruptedCompletion: Ctrl-C.
        """
        if self.question is None:
            raise InputError("nothing has been asked yet", "Ask something.")
        before = self.conversation.turns
        if before and before[-2]["content"] == self.question:
            self.conversation.turns = before[:-2]
        try:
            return self.answer(self.question, on_text)
        finally:
            if len(self.conversation.turns) < len(before):  # there is no new answer
                self.conversation.turns = before

    def answer(self, text: str, on_text: TextListener) -> CompletionResult:
        """Answer and remember question and answer; after an interruption, remember the part of the answer
        until then.

        Raises:
            InputError: the text alone does not fit the context.
            InterruptedCompletion: Ctrl-C; contains the text until then.
        """
        self.question = text
        prompt = self.conversation.prompt(self.model, text)
        engine, tokenizer = self.model.engine, self.model.tokenizer
        try:
            result = complete(engine, tokenizer, prompt, self.settings, on_text, self.scheduler, self.answers)
        except InterruptedCompletion as interrupted:
            if answer := interrupted.result.completions[0].text:
                self.conversation.remember(text, answer)
            raise
        finally:
            self.answers += 1
        self.conversation.remember(text, result.completions[0].text)
        return result
