"""The application: its commands, its version, and usage errors in our own words."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from smolctl import __version__
from smolctl.cli.bench import bench
from smolctl.cli.cache import cache
from smolctl.cli.compare import compare
from smolctl.cli.count_params import count_params
from smolctl.cli.eval import evaluate
from smolctl.cli.inspect_config import inspect_config
from smolctl.cli.push import push
from smolctl.cli.quantize import quantize
from smolctl.cli.resume import resume
from smolctl.cli.sample import sample
from smolctl.cli.train import train
from smolctl.cores import sharing_cores, usable_cores, usable_cpus
from smolctl.errors import ExitCode, UsageError
from smolctl.views.output import Output, prepare_streams

app = typer.Typer(
    name="smolctl",
    help="From a config to a trained, resumed, sampled, quantized and published small language model.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # plain help: rich alone would take longer to load than all the rest
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"smolctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command("inspect-config")(inspect_config)
app.command("count-params")(count_params)
app.command("train")(train)
app.command("resume")(resume)
app.command("sample")(sample)
app.command("compare")(compare)
app.command("eval")(evaluate)
app.command("quantize")(quantize)
app.command("bench")(bench)
app.command("push")(push)
app.command("cache")(cache)


def main() -> None:
    """Run the command line and exit with its code."""
    prepare_streams()
    try:
        # A container sees all processors of its host: more threads than its share would wait for one another.
        if usable_cores() < usable_cpus():
            os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
        with sharing_cores():
            code = app(standalone_mode=False)
    except Exception as error:
        # Typer's usage errors: its class is private, its interface is not.
        if not hasattr(error, "format_message"):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "smolctl")
        usage = UsageError(str(error.format_message()), f"See {command} --help.")
        Output(json="--json" in sys.argv).error(usage)
        code = ExitCode.USAGE
    sys.exit(int(code or 0))
