"""`smolctl sample`: one prompt by one model or by several, a file of prompts, or a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from smolctl.data.tokenizer.prompt import SpecialTokens
from smolctl.errors import InputError, UsageError
from smolctl.escaping import json_text
from smolctl.generation.batch import Batch
from smolctl.generation.compare import Divergence, diverge
from smolctl.generation.complete import (
    CompletionResult,
    CompletionSettings,
    InterruptedCompletion,
    complete,
)
from smolctl.generation.conversation import Conversation, Session
from smolctl.generation.engines import EngineOptions
from smolctl.generation.grammar import Grammar, compile_schema
from smolctl.generation.load import LoadedModel, load_model
from smolctl.generation.prompts import (
    SAMPLING,
    STDIN,
    PromptFile,
    PromptLine,
    finished_lines,
    read_prompts,
    read_text,
)
from smolctl.generation.sampling import applicable, resolve_sampling
from smolctl.outside import parse_json, read_json

SCHEMA_FILE = "Name a file with a JSON schema."
NO_PROMPT = "Give --prompt TEXT or pipe one in."


@dataclass(frozen=True)
class SampleRequest:
    """What to generate, and with which models.

    Raises:
        UsageError: values that cannot be combined.
    """

    models: tuple[str, ...] = ()  # none: the newest run
    prompt: str | None = None  # "-" and a pipe read stdin
    jsonl: str | None = None  # a file of prompts; "-" reads stdin
    resume_output: Path | None = None  # of `jsonl`: file for the answers; prompts that it answers are skipped
    interactive: bool = True  # whether a terminal without a prompt opens a session
    chat: bool | None = None  # use the chat template; None: in a session if the model has one
    system: str | None = None  # the system message of a chat
    special_tokens: SpecialTokens = "text"  # how special tokens spelled in a message are read
    compare: bool = False  # find where the other models' texts differ from the first one's
    batch_size: int = 8  # sequences of `jsonl` to decode together
    tokenizer: str | None = None  # a tokenizer.json, a folder, a GGUF or a Hub id; None: each model's own
    engine: EngineOptions = field(default_factory=EngineOptions)
    settings: CompletionSettings = field(default_factory=CompletionSettings)
    json_schema: Path | None = None  # a file with the JSON schema that every answer follows
    # Fields of `SamplingSettings` that the user set; the others come from the model or the defaults. None:
    # all come from `settings`.
    sampling: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        resolve_sampling(self.sampling or {}, {})
        if self.compare and len(self.models) < 2:
            raise UsageError("--compare needs two MODELs or more", "Name them one after the other.")
        if self.jsonl is not None and self.prompt is not None:
            raise UsageError("--jsonl and --prompt cannot be combined", "Write the prompt into the file.")
        if self.jsonl is not None and len(self.models) > 1:
            raise UsageError("--jsonl takes one MODEL", "Run it once for every model.")
        if self.resume_output is not None and self.jsonl is None:
            raise UsageError("--resume-output needs --jsonl", "Name the prompts with --jsonl FILE.")

    @property
    def continues_text(self) -> bool:
        """Whether the prompt is continued as plain text although the user did not ask for that."""
        return self.prompt is not None and self.chat is None


@dataclass(frozen=True)
class Loaded:
    """Event: a model is ready."""

    model: LoadedModel
    recommended: Mapping[str, Any]  # the recommended sampling settings that apply


@dataclass(frozen=True)
class Rendered:
    """Event: the prompt as the model reads it, after the chat template."""

    prompt: str


@dataclass(frozen=True)
class Streamed:
    """Event: a piece of a sample's text that will not change any more."""

    sample: int
    text: str


@dataclass(frozen=True)
class SampleResult:
    """The completions of one prompt by every model."""

    by_model: tuple[tuple[LoadedModel, CompletionResult], ...]
    # For each model and completion, where it differs from the first model's; None if models are not compared.
    divergences: tuple[tuple[Divergence | None, ...], ...] | None
    interrupted: bool = False  # by Ctrl-C: the last answers are unfinished, and later models have none


def sample(
    request: SampleRequest, on_event: Callable[[Loaded | Rendered | Streamed], None], stdin: TextIO
) -> SampleResult | Batch | Session:
    """Generate text.

    Args:
        request: what to generate.
        on_event: called when a model is ready and, with one model and one prompt, with each new piece of
            text.
        stdin: where a prompt is read from.

    Returns:
        The completions of one prompt; for a file of prompts a batch to iterate over; without a prompt on a
        terminal an interactive session.

    Raises:
        SmolError: a model cannot be read or run, or the prompt is missing or does not fit the context.
    """
    file = read_prompts(request.jsonl, stdin, request.settings) if request.jsonl is not None else None
    schema = read_json(request.json_schema, SCHEMA_FILE) if request.json_schema is not None else None
    done = finished_lines(file, request.resume_output) if file and request.resume_output else 0
    text = _prompt(request, stdin) if file is None else None
    if request.system is not None and not request.chat and _has_raw_prompt(text, file):
        raise UsageError("--system needs --chat", "Add --chat, or write it into the prompt.")
    models = [
        load_model(name, request.engine, request.tokenizer) for name in request.models or ("runs/latest",)
    ]
    own = request.sampling
    # Models that are compared get the same settings.
    recommended = models[0].recommended if own is not None and len(models) == 1 else {}
    settings = _resolved(request, request.settings, {}, recommended)
    grammars = [
        None if schema is None else compile_schema(schema, one.tokenizer, one.engine.config) for one in models
    ]
    for model in models:
        on_event(Loaded(model, applicable(recommended, own or {})))
    first = models[0]
    conversation = Conversation(bool(request.chat), request.system, special_tokens=request.special_tokens)
    if file is not None:
        resolved = _resolved_file(file, request, first, recommended, grammars[0])
        return Batch(first, resolved, conversation, request.batch_size, done)
    if text is None:
        conversation.chat = first.can_chat if request.chat is None else request.chat
        if request.system is not None and not conversation.chat:
            raise UsageError(f"--system needs a chat template, and {first.id} has none", "Leave it out.")
        return Session(first, replace(settings, grammar=grammars[0]), conversation)
    own_settings = [replace(settings, grammar=grammar) for grammar in grammars]
    return _complete_each(models, own_settings, conversation, text, on_event, request.compare)


def _resolved_file(
    file: PromptFile,
    request: SampleRequest,
    model: LoadedModel,
    recommended: Mapping[str, Any],
    grammar: Grammar | None,
) -> PromptFile:
    """The prompts with the settings of every line. A schema that does not compile is an error of its line."""

    @lru_cache
    def compiled(schema: str) -> Grammar:
        return compile_schema(parse_json(schema), model.tokenizer, model.engine.config)

    def resolved(line: PromptLine) -> PromptLine:
        try:
            own = grammar if line.schema is None else compiled(json_text(dict(line.schema)))
        except InputError as fault:
            return replace(line, fault=fault)
        return replace(line, settings=_resolved(request, line.settings, line.source, recommended, own))

    return replace(file, lines=tuple(line if line.fault else resolved(line) for line in file.lines))


def _complete_each(
    models: Sequence[LoadedModel],
    settings: Sequence[CompletionSettings],
    conversation: Conversation,
    text: str,
    on_event: Callable[[Rendered | Streamed], None],
    compare: bool,
) -> SampleResult:
    """The completions of one prompt by every model, each with its own settings; those of a single model
    are streamed.
    """
    streams = len(models) == 1
    on_text = (lambda number, piece: on_event(Streamed(number, piece))) if streams else None
    results, interrupted = [], False
    for model, own in zip(models, settings, strict=True):
        prompt = conversation.prompt(model, text)
        if streams:
            on_event(Rendered(prompt.text))
        try:
            result = complete(model.engine, model.tokenizer, prompt, own, on_text)
        except InterruptedCompletion as stopped:
            result, interrupted = stopped.result, True
        results.append((model, result))
        if interrupted:
            break
    return SampleResult(tuple(results), diverge(results) if compare else None, interrupted)


def _resolved(
    request: SampleRequest,
    settings: CompletionSettings,
    line: Mapping[str, Any],
    recommended: Mapping[str, Any],
    grammar: Grammar | None = None,
) -> CompletionSettings:
    """Settings with the model's recommendations for everything that the user and the line do not set."""
    settings = replace(settings, grammar=grammar)
    if request.sampling is None:
        return settings
    set_there = {key: line[key] for key in SAMPLING if line.get(key) is not None}
    return replace(settings, sampling=resolve_sampling({**request.sampling, **set_there}, recommended))


def _has_raw_prompt(text: str | None, file: PromptFile | None) -> bool:
    lines = file.lines if file else ()
    return text is not None or any(not line.fault and "prompt" in line.source for line in lines)


def _prompt(request: SampleRequest, stdin: TextIO) -> str | None:
    """The prompt; None for a session on a terminal."""
    if request.prompt not in (None, STDIN):
        return request.prompt
    if request.prompt is None and stdin.isatty():
        if not request.interactive or len(request.models) > 1:
            raise UsageError("no prompt", NO_PROMPT)
        return None
    text = read_text(stdin, "stdin", "Shorten the prompt.")
    if not text.strip():
        raise UsageError("no prompt: stdin is empty", NO_PROMPT)
    return text.removesuffix("\n")
