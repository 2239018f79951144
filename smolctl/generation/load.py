"""Load a model with its tokenizer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smolctl.data.tokenizer.prompt import Prompt, SpecialTokens, count_characters
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError
from smolctl.escaping import whole_characters
from smolctl.generation.engine import Engine
from smolctl.generation.engines import EngineOptions, make_engine
from smolctl.sources import open_source


@dataclass(frozen=True)
class LoadedModel:
    """An engine with its tokenizer."""

    id: str
    engine: Engine
    tokenizer: Tokenizer
    load_s: float
    notes: tuple[str, ...] = ()  # problems of the source, and why no faster engine runs

    @property
    def can_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.engine.config.max_position_embeddings

    def prompt(self, text: str) -> Prompt:
        """See `Tokenizer.prompt`. Text from anywhere comes through here, or through `chat_prompt`.

        Raises:
            PromptTooLongError: the text cannot fit the context.
        """
        self.tokenizer.require_room(len(text), self.context)
        return self.tokenizer.prompt(whole_characters(text))

    def chat_prompt(
        self, messages: Sequence[Mapping[str, str]], special_tokens: SpecialTokens = "text"
    ) -> Prompt:
        """See `Tokenizer.chat_prompt`.

        Raises:
            InputError: the model has no chat template, or it refuses the messages.
            PromptTooLongError: the messages cannot fit the context.
        """
        if self.tokenizer.chat_template is None:
            raise InputError(
                f"{self.id}: the model has no chat template; it continues text",
                "Leave out --chat, or choose an instruction-tuned model.",
            )
        self.tokenizer.require_room(count_characters(list(messages)), self.context)
        whole = [{**one, "content": whole_characters(one["content"])} for one in messages]
        return self.tokenizer.chat_prompt(whole, special_tokens, self.context)


def load_model(model: str, options: EngineOptions = EngineOptions()) -> LoadedModel:  # noqa: B008 - frozen
    """Read weights, as they are stored where the engine can run that, and the tokenizer.

    Raises:
        SmolError: the model cannot be read or run, or it comes without a tokenizer.
    """
    started = time.perf_counter()
    source = open_source(model)
    source.require_config()
    source.require_weights()
    tokenizer = Tokenizer.from_files(source.require_tokenizer(), model)
    tokenizer.require_fit(source.require_config().vocab_size)
    engine = make_engine(source, options)
    notes = (*source.problems, *([engine.note] if engine.note else []))
    return LoadedModel(model, engine, tokenizer, time.perf_counter() - started, notes)
