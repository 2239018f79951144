"""Prompts one after another: each on its own, or as turns of a chat."""

from __future__ import annotations

from dataclasses import dataclass, field

from smolctl.generation.load import LoadedModel


@dataclass
class Conversation:
    """What was said so far. Without `chat` a prompt is the text itself and nothing is remembered."""

    chat: bool
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, model: LoadedModel, text: str) -> str:
        """The text to continue so that the model answers `text`.

        Raises:
            InputError: `chat` is set and the model has no chat template.
        """
        if not self.chat:
            return text
        first = [{"role": "system", "content": self.system}] if self.system else []
        return model.chat_prompt([*first, *self.turns, {"role": "user", "content": text}])

    def remember(self, text: str, answer: str) -> None:
        """Add a turn of each side."""
        if self.chat:
            self.turns.append({"role": "user", "content": text})
            self.turns.append({"role": "assistant", "content": answer})
