"""smolctl sample"""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from smolctl.cli.options import Debug, Json, Quiet, Verbose, command
from smolctl.errors import UsageError
from smolctl.views.output import Output

if TYPE_CHECKING:
    from smolctl.generation.complete import CompletionResult, CompletionSettings
    from smolctl.generation.load import LoadedModel

ALTERNATIVES = 5  # other tokens that --explain shows with each


class EngineName(StrEnum):
    """Values of --engine."""

    AUTO = "auto"
    NATIVE = "native"
    TORCH = "torch"


class Dtype(StrEnum):
    """Values of --dtype."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Speculate(StrEnum):
    """Values of --speculate."""

    AUTO = "auto"
    OFF = "off"
    LOOKUP = "lookup"


@command
def sample(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Run, .ckpt, folder, .gguf or Hub id; several stand side by side. Default: newest run.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", help="Text to continue; '-' or a pipe reads stdin.", show_default=False
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Use the model's chat template; without --prompt that is what a model with one does.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System message for --chat.", show_default=False)
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Completions of the prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens up to this sum.")] = 0.95,
    min_p: Annotated[
        float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: tokens already there become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="Text that ends the answer; repeatable.", show_default=False),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Mark where each MODEL leaves the first one.", show_default=False),
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show each token's probability and others.", show_default=False),
    ] = False,
    jsonl: Annotated[
        str | None,
        typer.Option(
            "--jsonl",
            metavar="FILE",
            help='Prompts, one JSON object a line: {"prompt": ...} or {"messages": ...}; \'-\' reads stdin.',
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Sequences of --jsonl that decode together.")
    ] = 8,
    speculate: Annotated[
        Speculate,
        typer.Option(
            "--speculate",
            help="lookup: guess tokens from the text so far, check several at once; auto: where it is exact.",
        ),
    ] = Speculate.AUTO,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")] = 0,
    engine: Annotated[
        EngineName,
        typer.Option(
            "--engine", help="native: compiled for CPUs; torch: PyTorch; auto: native where it runs."
        ),
    ] = EngineName.AUTO,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            "--dtype",
            help="Weights that are not quantized, as this; else as in the file.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Threads; one a core by default.", show_default=False),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Continue a prompt, or chat.

    \b
    smolctl sample                                  the newest run, interactively
    smolctl sample runs/latest --prompt "Once upon a time"
    smolctl sample FILE.gguf --chat --prompt "What is the capital of France?"
    smolctl sample runs/nano-001@100 runs/nano-001 --compare --prompt "def main():"
    smolctl sample FILE.gguf --jsonl prompts.jsonl > answers.jsonl
    """
    import torch

    from smolctl.cli.sample_modes import check_usage, complete_jsonl, converse, read_jsonl
    from smolctl.generation.compare import diverge
    from smolctl.generation.complete import CompletionSettings, complete
    from smolctl.generation.conversation import Conversation
    from smolctl.generation.engines import EngineOptions
    from smolctl.generation.load import load_model
    from smolctl.generation.sampling import SamplingSettings
    from smolctl.views.samples import show_explanation, show_side_by_side, to_json

    out = Output(json, quiet, verbose)
    settings = CompletionSettings(
        max_tokens=max_tokens,
        samples=samples,
        stop=tuple(stop or ()),
        seed=seed,
        sampling=SamplingSettings(temperature, top_k, top_p, min_p, repetition_penalty),
        speculation=speculate.value,
        alternatives=ALTERNATIVES if explain else 0,
    )
    check_usage(models or [], compare, jsonl, prompt)
    requests = read_jsonl(jsonl) if jsonl is not None else None
    may_ask = not json and len(models or ()) < 2
    text = _prompt_text(prompt, may_ask) if requests is None else None
    if threads is not None:
        torch.set_num_threads(threads)
    options = EngineOptions(engine.value, dtype.value if dtype else None)
    loaded = [load_model(model, options) for model in models or ["runs/latest"]]
    for model in loaded:
        for note in model.notes:
            out.talk(f"{model.id}: {note}")
    if requests is not None and jsonl is not None:
        conversation = Conversation(bool(chat), system)
        complete_jsonl(out, loaded[0], requests, settings, conversation, jsonl, batch_size)
    elif text is None:
        chats = loaded[0].can_chat if chat is None else chat
        converse(out, loaded[0], settings, Conversation(chats, system))
    elif len(loaded) == 1:
        result = _stream(out, loaded[0], Conversation(bool(chat), system).prompt(loaded[0], text), settings)
        out.document(to_json(loaded[0], result))
    else:
        conversation = Conversation(bool(chat), system)
        results = [
            (model, complete(model.engine, model.tokenizer, conversation.prompt(model, text), settings))
            for model in loaded
        ]
        divergences = diverge(results) if compare else None
        show_side_by_side(out, results, divergences)
        for model, result in results if explain else ():
            out.line(model.id)
            show_explanation(out, model, result)
        documents = [
            to_json(model, result, divergences[number] if divergences else None)
            for number, (model, result) in enumerate(results)
        ]
        out.document({"models": documents})


def _prompt_text(prompt: str | None, may_ask: bool) -> str | None:
    """The prompt of --prompt or stdin; None to ask for prompts on the terminal."""
    if prompt not in (None, "-"):
        return prompt
    if prompt is None and sys.stdin.isatty():
        if not may_ask:
            raise UsageError("no prompt", "Give --prompt TEXT or pipe one in.")
        return None
    text = sys.stdin.read()
    if not text.strip():
        raise UsageError("no prompt: stdin is empty", "Give --prompt TEXT or pipe one in.")
    return text.removesuffix("\n")


def _stream(out: Output, model: LoadedModel, prompt: str, settings: CompletionSettings) -> CompletionResult:
    """Complete one prompt and print it as it comes."""
    from smolctl.generation.complete import complete
    from smolctl.views.samples import StreamView, show_explanation, timing_line

    if out.verbose:
        out.talk(f"prompt as the model sees it:\n{prompt}")
    view = StreamView(out, settings.samples)
    result = complete(model.engine, model.tokenizer, prompt, settings, view)
    view.close()
    if settings.alternatives:
        show_explanation(out, model, result)
    if not out.json:
        out.talk(timing_line(model, result.timing))
    return result
