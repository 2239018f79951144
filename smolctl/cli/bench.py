"""smolctl bench"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from smolctl.cli.options import Debug, Json, Quiet, Verbose, command
from smolctl.errors import ExitCode, GateError, UsageError
from smolctl.views.output import Output


@command
def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Run, preset (with random weights), .ckpt, folder, .safetensors, .gguf or Hub id. "
            "Default: the newest run.",
            show_default=False,
        ),
    ] = "runs/latest",
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            metavar="NAME",
            help="load, prefill, decode, batch, train, tokenize, checkpoint; repeatable, or separated by "
            "commas. Default: all that the model has what they need.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="SCHEME",
            help="Also measure the model in a scheme of `smolctl quantize`; repeatable.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="PEER",
            help="transformers, llama.cpp, litgpt, where installed: same weights, same work, in turns.",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Rounds that count; below 6 none can speak of noise.")
    ] = 7,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of every engine. Default: one a core.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences of batched decoding.")] = 8,
    save: Annotated[
        Path | None,
        typer.Option("--save", help="Write the record there, to be a baseline.", show_default=False),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="Compare with a saved record.", show_default=False)
    ] = None,
    fail_below: Annotated[
        float | None,
        typer.Option(
            "--fail-below",
            min=0.0,
            help="Exit with 5 when anything has less than this share of its baseline's speed.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the results into a PNG.", show_default=False)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables in Markdown.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Measure a model's speed and memory here, beside the machine's limits and other engines.

    \b
    smolctl bench                                       the newest run, everything
    smolctl bench FILE.gguf --against llama.cpp         who is faster, and whether it is more than noise
    smolctl bench --to int8,int4 --suite decode         what quantizing brings
    smolctl bench --save base.json                      and later:
    smolctl bench --baseline base.json --fail-below 0.95
    """
    from smolctl.benchmark.baseline import compare_with, read_baseline, save_record
    from smolctl.benchmark.bench import BenchOptions
    from smolctl.benchmark.bench import bench as run
    from smolctl.views.bench import bench_document, show_bench
    from smolctl.views.bench_chart import draw_bench

    view = Output(json, quiet, verbose)
    # A stop is an exit: the contenders' processes and files go too.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(ExitCode.TERMINATED))
    if fail_below is not None and baseline is None:
        raise UsageError("--fail-below compares with nothing", "Name a record with --baseline.")
    if baseline is not None:
        read_baseline(baseline)  # rather now than after minutes
    options = BenchOptions(
        suites=_listed(suite),
        schemes=_listed(to),
        against=_listed(against),
        repeats=repeats,
        threads=threads,
        batch=batch,
    )
    report = run(model, options, view.talk)
    changes = compare_with(report, baseline, fail_below) if baseline is not None else None
    show_bench(view, report, changes, markdown)
    if save is not None:
        save_record(bench_document(report), save)
        view.talk(f"Saved to {save}.")
    if plot is not None:
        draw_bench(report, plot)
    if report.wrong:
        named = ", ".join(f"{one.suite} {one.engine} {one.precision}" for one in report.wrong)
        raise GateError(f"wrong answers: {named}", "Their speed says nothing: report this.")
    if changes is not None and changes.failed:
        named = ", ".join(f"{one.name} × {one.ratio:.2f}" for one in changes.failed)
        raise GateError(f"below {fail_below} of the baseline: {named}", "Repeat on a quiet machine.")


def _listed(given: list[str] | None) -> tuple[str, ...]:
    """The values of an option that is repeatable and takes commas, each once."""
    values = [part.strip() for item in given or () for part in item.split(",")]
    return tuple(dict.fromkeys(value for value in values if value))
