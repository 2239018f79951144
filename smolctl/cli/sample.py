"""smolctl sample"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from smolctl.cli.completion import complete_weights
from smolctl.cli.options import NEWEST, WEIGHTS, Dtype, KvCache, Threads, capped_threads, command
from smolctl.views.output import Output

ALTERNATIVES = 5  # other tokens that --explain shows with each
ELSE = "Default: the model's recommendation, else"


@command
def sample(
    output: Output,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help=f"{WEIGHTS}; several are shown side by side. {NEWEST}",
            autocompletion=complete_weights,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; '-' or a pipe reads stdin.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Use the model's chat template. Default without --prompt if the model has one.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message for --chat.")] = None,
    special_tokens: Annotated[
        Literal["text", "tokens"],
        typer.Option(
            "--special-tokens",
            help="How <|im_end|> and the like in chat messages are read: as text or as control tokens.",
        ),
    ] = "text",
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, max=10_000, help="Completions per prompt.")
    ] = 1,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Maximum number of tokens to generate.")
    ] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", help=f"Sampling temperature; 0 always takes the likeliest token. {ELSE} 0.8."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", help=f"Keep the k likeliest tokens; 0 keeps all. {ELSE} 0."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help=f"Keep the likeliest tokens up to this total probability. {ELSE} 0.95."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help=f"Drop tokens below this fraction of the likeliest one. {ELSE} 0."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty", help=f"Values above 1 make repeated tokens less likely. {ELSE} 1."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="Text that ends the answer; repeatable."),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(
            "--json-schema",
            metavar="FILE",
            help="JSON schema that every answer follows; requires the extra 'serve'.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Mark where each MODEL's text differs from the first one's.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show every token's probability and the likeliest alternatives.")
    ] = False,
    jsonl: Annotated[
        str | None,
        typer.Option(
            "--jsonl",
            metavar="FILE",
            help='File with one prompt per line: {"prompt": ...} or {"messages": ...}, optionally with '
            "sampling settings under OpenAI's names; '-' reads stdin.",
        ),
    ] = None,
    resume_output: Annotated[
        Path | None,
        typer.Option(
            "--resume-output",
            metavar="FILE",
            help="Write the answers of --jsonl to FILE, skipping prompts that FILE already answers.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Number of --jsonl sequences to decode together.")
    ] = 8,
    speculate: Annotated[
        Literal["auto", "off", "lookup"],
        typer.Option(
            "--speculate",
            help="Speculative decoding. lookup: take draft tokens from the text so far; auto: lookup where "
            "results stay bit-identical.",
        ),
    ] = "auto",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="NAME",
            help="tokenizer.json, folder, GGUF or Hub id. Default: the model's.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Random seed; the same seed gives the same text.")] = 0,
    engine: Annotated[
        Literal["auto", "native", "torch"],
        typer.Option(
            "--engine", help="native: compiled C, for CPUs; torch: PyTorch; auto: native where it runs."
        ),
    ] = "auto",
    dtype: Dtype = None,
    kv_cache: KvCache = "auto",
    threads: Threads = None,
) -> None:
    """Generate text from a prompt, or chat.

    \b
    smolctl sample                             # the newest run, interactively
    smolctl sample runs/latest --prompt "Once upon a time"
    smolctl sample FILE.gguf --chat --prompt "What is the capital of France?"
    smolctl sample runs/nano-001@150 runs/nano-001 --compare --prompt "def f("
    smolctl sample FILE.gguf --jsonl prompts.jsonl > answers.jsonl
    smolctl sample FILE.gguf --jsonl prompts.jsonl --resume-output answers.jsonl
    """
    from smolctl.generation.complete import CompletionSettings
    from smolctl.generation.engines import EngineOptions
    from smolctl.generation.sample import SampleRequest
    from smolctl.generation.sample import sample as generate
    from smolctl.views.samples import SampleView

    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    request = SampleRequest(
        models=tuple(models or ()),
        prompt=prompt,
        jsonl=jsonl,
        resume_output=resume_output,
        interactive=not output.json,
        chat=chat,
        system=system,
        special_tokens=special_tokens,
        json_schema=json_schema,
        compare=compare,
        batch_size=batch_size,
        tokenizer=tokenizer,
        engine=EngineOptions(engine, dtype, capped_threads(output, threads), kv_cache),
        settings=CompletionSettings(
            max_tokens=max_tokens,
            samples=samples,
            stop=tuple(stop or ()),
            seed=seed,
            speculation=speculate,
            alternatives=ALTERNATIVES if explain else 0,
        ),
        sampling={name: value for name, value in sampling.items() if value is not None},
    )
    view = SampleView(output, request)
    view.show(generate(request, view, sys.stdin or io.StringIO()))
