"""Prompts one after another: each on its own, or as turns of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from smolctl.data.tokenizer.prompt import Prompt, SpecialTokens
from smolctl.generation.complete import (
    CompletionResult,
    CompletionSettings,
    TextListener,
    complete,
    new_scheduler,
)
from smolctl.generation.load import LoadedModel

# A session holds at most this many tokens, also where the model's context is longer: its cache is allocated
# at once.
MOST_TOKENS = 8192
# When the context is full, the oldest turns go until this share of it is free: what follows them must be read
# again, and not at every turn.
FREE_SHARE = 0.25


@dataclass
class Conversation:
    """The turns so far. Without `chat` a prompt is the text itself and nothing is remembered."""

    chat: bool
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    special_tokens: SpecialTokens = "text"  # what special tokens are that a message spells

    def prompt(self, model: LoadedModel, text: str) -> Prompt:
        """What to continue so that the model answers `text`.

        Raises:
            InputError: `chat` is set and the model has no chat template.
        """
        if not self.chat:
            return model.tokenizer.prompt(text)
        return self.render(model, [*self.turns, {"role": "user", "content": text}])

    def render(self, model: LoadedModel, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """Messages in the model's template, the system message first where they bring none of their own.

        Raises:
            InputError: the model has no chat template, or it refuses the messages.
        """
        own = messages[0]["role"] == "system"
        first = [{"role": "system", "content": self.system}] if self.system and not own else []
        return model.chat_prompt([*first, *messages], self.special_tokens)

    def remember(self, text: str, answer: str) -> None:
        """Add a turn of each side."""
        if self.chat:
            self.turns.append({"role": "user", "content": text})
            self.turns.append({"role": "assistant", "content": answer})

    def make_room(self, model: LoadedModel, text: str, capacity: int, max_tokens: int) -> int:
        """Forget the oldest turns until `text` and its answer fit.

        Args:
            model: whose template and tokenizer count.
            text: the next prompt.
            capacity: tokens of a conversation.
            max_tokens: of the answer; half of the capacity at most is kept free for it.

        Returns:
            How many turns were forgotten.
        """
        before, free = len(self.turns), min(max_tokens, capacity // 2)
        while self.turns and len(self.prompt(model, text).ids) + free > capacity:
            del self.turns[:2]
            free = max(free, int(capacity * FREE_SHARE))
        return (before - len(self.turns)) // 2


class Session:
    """A conversation that keeps its KV cache: every turn prefills only what is new.

    Args:
        model: answers.
        settings: how; of several samples the first is remembered.
        conversation: may have turns already.
    """

    def __init__(self, model: LoadedModel, settings: CompletionSettings, conversation: Conversation) -> None:
        self.model, self.settings, self.conversation = model, settings, conversation
        self.capacity = min(model.engine.config.max_position_embeddings, MOST_TOKENS)
        self.scheduler = new_scheduler(model.engine, settings, settings.samples, self.capacity)
        self.answers = 0

    def make_room(self, text: str) -> int:
        """See `Conversation.make_room`."""
        return self.conversation.make_room(self.model, text, self.capacity, self.settings.max_tokens)

    def answer(self, text: str, on_text: TextListener) -> CompletionResult:
        """Answer and remember both; when interrupted, remember the part of the answer until then.

        Raises:
            InputError: the text alone does not fit the context.
        """
        pieces: list[str] = []

        def listen(sample: int, piece: str) -> None:
            if sample == 0:
                pieces.append(piece)
            on_text(sample, piece)

        prompt = self.conversation.prompt(self.model, text)
        engine, tokenizer = self.model.engine, self.model.tokenizer
        try:
            result = complete(engine, tokenizer, prompt, self.settings, listen, self.scheduler, self.answers)
        except KeyboardInterrupt:
            if pieces:
                self.conversation.remember(text, "".join(pieces))
            raise
        finally:
            self.answers += 1
        self.conversation.remember(text, result.completions[0].text)
        return result
