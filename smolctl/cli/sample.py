"""smolctl sample"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from smolctl.cli.options import Debug, Json, Quiet, Verbose, command
from smolctl.errors import UsageError
from smolctl.views.output import Output

if TYPE_CHECKING:
    from smolctl.generation.complete import CompletionResult, CompletionSettings
    from smolctl.generation.conversation import Conversation
    from smolctl.generation.load import LoadedModel


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
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
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
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")] = 0,
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
    smolctl sample runs/nano-001@100 runs/nano-001 --prompt "def main():"
    """
    from smolctl.generation.complete import CompletionSettings, complete
    from smolctl.generation.conversation import Conversation
    from smolctl.generation.load import load_model
    from smolctl.generation.sampling import SamplingSettings
    from smolctl.views.samples import show_side_by_side, to_json

    out = Output(json, quiet, verbose)
    settings = CompletionSettings(
        max_tokens=max_tokens,
        samples=samples,
        stop=tuple(stop or ()),
        seed=seed,
        sampling=SamplingSettings(temperature, top_k, top_p, min_p, repetition_penalty),
    )
    text = _prompt_text(prompt, may_ask=not json and len(models or ()) < 2)
    loaded = [load_model(model) for model in models or ["runs/latest"]]
    for model in loaded:
        for note in model.notes:
            out.talk(f"{model.id}: {note}")
    conversation = Conversation(chat, system)
    if text is None:
        _converse(out, loaded[0], settings, conversation)
    elif len(loaded) == 1:
        result = _stream(out, loaded[0], conversation.prompt(loaded[0], text), settings)
        out.document(to_json(loaded[0], result))
    else:
        results = [
            (model, complete(model.engine, model.tokenizer, conversation.prompt(model, text), settings))
            for model in loaded
        ]
        show_side_by_side(out, results)
        out.document({"models": [to_json(model, result) for model, result in results]})


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
    from smolctl.views.samples import StreamView, timing_line

    if out.verbose:
        out.talk(f"prompt as the model sees it:\n{prompt}")
    view = StreamView(out, settings.samples)
    result = complete(model.engine, model.tokenizer, prompt, settings, view)
    view.close()
    if not out.json:
        out.talk(timing_line(model, result.timing))
    return result


def _converse(
    out: Output, model: LoadedModel, settings: CompletionSettings, conversation: Conversation
) -> None:
    """Ask for prompts until the input ends. A chat goes on; without --chat every prompt stands alone."""
    if model.can_chat and not conversation.chat:
        out.talk("This model has a chat template: --chat uses it.")
    out.talk(f"{model.id}: type a prompt, Ctrl-D ends.")
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if text.strip():
            result = _stream(out, model, conversation.prompt(model, text), settings)
            conversation.remember(text, result.completions[0].text)
