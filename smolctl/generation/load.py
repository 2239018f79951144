"""Load a model with its tokenizer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smolctl.data.tokenizer.prompt import Prompt, SpecialTokens, count_characters
from smolctl.data.tokenizer.tokenizer import Tokenizer, read_tokenizer_of
from smolctl.errors import InputError
from smolctl.generation.complete import CompletionSettings
from smolctl.generation.engine import Engine
from smolctl.generation.engines import EngineOptions, make_engine
from smolctl.generation.prompts import SAMPLING, changed_settings
from smolctl.sources import open_weights
from smolctl.sources.base import SourceKind


@dataclass(frozen=True)
class LoadedModel:
    """An engine with its tokenizer."""

    id: str
    engine: Engine
    tokenizer: Tokenizer
    load_s: float
    notes: tuple[str, ...] = ()  # problems of the source, and why a faster engine is not used
    # Fields of `SamplingSettings` that the model's authors recommend, and the file that contains them.
    recommended: Mapping[str, Any] = field(default_factory=dict)
    recommended_in: str = ""

    @property
    def can_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    @property
    def context(self) -> int:
        """Maximum tokens of a prompt and its answer."""
        return self.engine.config.max_position_embeddings

    def prompt(self, text: str) -> Prompt:
        """See `Tokenizer.prompt`. All text is encoded here or in `chat_prompt`.

        Raises:
            PromptTooLongError: the text cannot fit the context.
        """
        self.tokenizer.require_room(len(text), self.context)
        return self.tokenizer.prompt(text)

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
                f"{self.id}: the model has no chat template and can only continue text",
                "Leave out --chat, or choose an instruction-tuned model.",
            )
        self.tokenizer.require_room(count_characters(list(messages)), self.context)
        return self.tokenizer.chat_prompt(messages, special_tokens, self.context)


def load_model(
    model: str,
    options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
    tokenizer_of: str | None = None,
) -> LoadedModel:
    """Load weights, as they are stored if the engine supports that, and the tokenizer.

    Args:
        model: any MODEL with weights.
        options: of the engine.
        tokenizer_of: a tokenizer.json, a folder, a GGUF or a Hub id; None: the model's own.

    Raises:
        SmolError: the model cannot be read or run, or has no tokenizer.
    """
    started = time.perf_counter()
    source = open_weights(model)
    if tokenizer_of is None:
        files = source.require_tokenizer(
            "Put its tokenizer.json there, or name one with `sample --tokenizer`."
        )
    else:
        files = read_tokenizer_of(tokenizer_of)
    tokenizer = Tokenizer.from_files(files, tokenizer_of or model)
    tokenizer.require_fit(source.require_config().vocab_size)
    engine = make_engine(source, options)
    place = "the GGUF's metadata" if source.kind is SourceKind.GGUF else "generation_config.json"
    recommended, unusable = usable_settings(files.recommended)
    notes = [*source.problems, *([engine.note] if engine.note else [])]
    notes += [f"{place} recommends sampling settings that cannot be used: {reason}" for reason in unusable]
    return LoadedModel(
        model, engine, tokenizer, time.perf_counter() - started, tuple(notes), recommended, place
    )


def usable_settings(found: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The recommended fields of `SamplingSettings` that are usable, and why the others are not.

    Args:
        found: under the names of generation_config.json. Without `do_sample`, sampling settings are assumed
            to apply; if it is false, the likeliest token is chosen.
    """
    usable, reasons = {}, []
    for key in (key for key in SAMPLING if key in found):
        try:
            changed_settings({key: found[key]}, CompletionSettings())
            usable[key] = found[key]
        except InputError as error:
            reasons.append(error.message)
    return usable | ({"temperature": 0.0} if found.get("do_sample") is False else {}), reasons
