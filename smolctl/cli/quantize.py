"""smolctl quantize"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from smolctl.cli.completion import SCHEMES, complete_weights, names
from smolctl.cli.options import NEWEST, WEIGHTS, AcceptGuesses, command
from smolctl.errors import GateError
from smolctl.views.output import Output


@command
def quantize(
    output: Output,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=f"{WEIGHTS}. {NEWEST}",
            show_default=False,
            autocompletion=complete_weights,
        ),
    ] = "runs/latest",
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="SCHEME",
            help=f"{', '.join(SCHEMES)}; repeatable, or separated by commas. Default: int8.",
            show_default=False,
            autocompletion=names(*SCHEMES),
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of the result; with several schemes, the folder that holds them. "
            "Default: RUN/quantized/SCHEME, or NAME-SCHEME in this folder.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the result of an earlier call.")] = False,
    group: Annotated[
        int,
        typer.Option(
            "--group", help="Number of columns that share a scale in int8 and int4; a multiple of 32."
        ),
    ] = 32,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="PATTERN",
            help="Tensors that are not quantized: down_proj, 'layers.1*', 're:EXPRESSION'; repeatable.",
            show_default=False,
        ),
    ] = None,
    bits_map: Annotated[
        list[str] | None,
        typer.Option(
            "--bits-map",
            metavar="PATTERN=BITS",
            help="4, 8, 16 or 32 bits for some tensors: 'down_proj=8,re:.*layers.0.*=8'; repeatable.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Search for the best scales, using activations on the training text."
        ),
    ] = False,
    activations: Annotated[
        Literal["per-tensor", "per-token"],
        typer.Option(
            "--activations", help="Share one activation scale per tensor or per token in int8-dynamic."
        ),
    ] = "per-tensor",
    per_row: Annotated[
        bool, typer.Option("--per-row", help="Use one scale per matrix row in int8-dynamic.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="TEXT", help="Text to measure on; repeatable. Default: held-out text."
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option("--windows", min=2, help="Number of sequences of 256 tokens to measure on.")
    ] = 24,
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="Also report the loss that each tensor causes.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure every variant against the source.")
    ] = True,
    max_bpb_increase: Annotated[
        float | None,
        typer.Option("--max-bpb-increase", help="Exit with code 5 if bits per byte rise by more than this."),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", help="Exit with code 5 if the mean KL divergence in nats exceeds this."),
    ] = None,
    accept_guesses: AcceptGuesses = False,
) -> None:
    """Quantize a model, and measure its quality and speed.

    \b
    smolctl quantize                                     # the newest run in int8
    smolctl quantize FILE.gguf --to int8,int4,gguf-q4_0  # several schemes
    smolctl quantize --to int4 --calibrate               # searched scales
    smolctl quantize --to int4 --per-tensor              # the loss of each tensor
    smolctl quantize --to int4 --bits-map down_proj=8    # mixed precision
    smolctl quantize --to int8 --max-kl 0.01             # a gate: exit code 5
    """
    from smolctl.quantization.quantize import QuantizeOptions
    from smolctl.quantization.quantize import quantize as run
    from smolctl.quantization.schemes import SchemeOptions, parse_bits_map, parse_skip, split_commas
    from smolctl.quantization.verdict import Gates
    from smolctl.views.quantization import show_quantization

    options = QuantizeOptions(
        schemes=split_commas(to or ["int8"]),
        scheme_options=SchemeOptions(
            group, parse_skip(skip or ()), parse_bits_map(bits_map or ()), activations, per_row, calibrate
        ),
        out=out,
        force=force,
        measure=measure,
        data=tuple(data or ()),
        windows=windows,
        per_tensor=per_tensor,
        gates=Gates(max_bpb_increase, max_kl),
        accept_guesses=accept_guesses,
    )
    report = run(model, options, output.message)
    show_quantization(output, report)
    if report.failed_gates:
        failed = {line.partition(":")[0] for line in report.failed_gates}
        hints = (f"Try {one.hint}." for one in report.variants if one.hint and one.scheme in failed)
        hint = next(hints, "Use a scheme of more bits; int8 and int4 also have --skip and --bits-map.")
        raise GateError("; ".join(report.failed_gates), hint)
