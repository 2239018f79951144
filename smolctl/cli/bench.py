"""smolctl bench"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smolctl.cli.completion import PEERS, SCHEMES, SUITES, complete_model, names
from smolctl.cli.options import NEWEST, WEIGHTS, Threads, capped_threads, command
from smolctl.errors import UsageError
from smolctl.views.output import Output


@command
def bench(
    output: Output,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=f"{WEIGHTS}, or a preset or YAML (with random weights). {NEWEST}",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = "runs/latest",
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            metavar="NAME",
            help=f"{', '.join(SUITES)}; repeatable, or separated by commas. "
            "Default: every suite that this model supports.",
            show_default=False,
            autocompletion=names(*SUITES),
        ),
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="SCHEME",
            help="Also measure the model quantized to a scheme of `smolctl quantize`; repeatable.",
            show_default=False,
            autocompletion=names(*SCHEMES),
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="PEER",
            help="Also measure transformers, llama.cpp or litgpt, if installed, on the same weights.",
            show_default=False,
            autocompletion=names(*PEERS),
        ),
    ] = None,
    repeats: Annotated[
        int,
        typer.Option(
            "--repeats", min=1, help="Rounds after the warm-up; at least 6 for a test of significance."
        ),
    ] = 7,
    threads: Threads = None,
    batch: Annotated[
        int, typer.Option("--batch", min=1, max=10_000, help="Sequences per batch in the batch suite.")
    ] = 8,
    save: Annotated[
        Path | None,
        typer.Option("--save", help="Write the results to a file, for --baseline.", show_default=False),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", help="Compare with results that --save wrote.", show_default=False),
    ] = None,
    fail_below: Annotated[
        float | None,
        typer.Option(
            "--fail-below",
            help="Exit with code 5 if any result is below this share of its baseline speed, or is missing on "
            "either side.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the results to a PNG file.", show_default=False)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables in Markdown.")] = False,
) -> None:
    """Measure the speed and memory of a model.

    Results are compared with the machine's limits, and with other engines if asked.

    \b
    smolctl bench                                         # the newest run
    smolctl bench FILE.gguf --against llama.cpp           # which one is faster
    smolctl bench --to int8,int4 --suite decode           # gain by quantizing
    smolctl bench --save base.json                        # save a baseline
    smolctl bench --baseline base.json --fail-below 0.95  # compare with it
    """
    from smolctl.benchmark.baseline import compare_with, is_baseline, read_baseline, save_record
    from smolctl.benchmark.bench import BenchOptions
    from smolctl.benchmark.bench import bench as run
    from smolctl.ownership import require_replaceable_file
    from smolctl.quantization.schemes import split_commas
    from smolctl.views.bench import bench_document, show_bench
    from smolctl.views.bench_chart import draw_bench, is_own_chart

    if fail_below is not None and baseline is None:
        raise UsageError("--fail-below needs a baseline to compare with", "Name one with --baseline.")
    if fail_below is not None and fail_below <= 0:
        raise UsageError(f"--fail-below {fail_below}: must be above 0", "Give one such as 0.95.")
    if baseline is not None:
        read_baseline(baseline)  # fail now rather than after minutes
    for target, name, is_own in ((save, "--save", is_baseline), (plot, "--plot", is_own_chart)):
        if target is not None:
            require_replaceable_file(target, name, force=True, reads=(), is_own=is_own)
    options = BenchOptions(
        suites=split_commas(suite or ()),
        schemes=split_commas(to or ()),
        against=split_commas(against or ()),
        repeats=repeats,
        threads=capped_threads(output, threads),
        batch=batch,
    )
    report = run(model, options, output.message)
    changes = compare_with(report, baseline, fail_below) if baseline is not None else None
    show_bench(output, report, changes, markdown)
    if save is not None:
        save_record(bench_document(report), save)
        output.message(f"Saved to {save}.")
    if plot is not None:
        draw_bench(report, plot)
    report.require_right()
    if changes is not None:
        changes.require_passed()
