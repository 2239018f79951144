"""The application: its commands, its version, and usage errors in smolctl's words."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any

import typer

from smolctl import __version__
from smolctl.cli.completion import answering
from smolctl.cli.options import PlainCommand
from smolctl.cores import compute_threads, sharing_cores, usable_cores, usable_cpus
from smolctl.errors import ExitCode, InputError, UsageError
from smolctl.views.output import Output, prepare_streams

# Every command in the order of the help, each in a module of its name with one function of that name.
COMMANDS = (
    "inspect-config",
    "count-params",
    "train",
    "resume",
    "sample",
    "serve",
    "compare",
    "eval",
    "quantize",
    "bench",
    "push",
    "cache",
)
# Replacements for options that users often try but that a command does not have.
INSTEAD = {
    ("resume", "--steps"): "Use --until N for the last step, or --extra N for further steps.",
    (
        "resume",
        "--data",
    ): "A run keeps its data. For other data: smolctl train --init-from RUN --data …",
    ("sample", "--greedy"): "Use --temperature 0.",
    ("quantize", "--scheme"): "Use --to SCHEME.",
}


# Typer's messages about the command line, and smolctl's.
MESSAGES = (
    (r"Missing \w+ '(.+)'\.", r"\1 is missing"),
    (r"Option '(.+)' requires an argument\.", r"\1 has no value"),
    (r"Got unexpected extra arguments?(?:\(s\))? \((.+)\)", r"no argument is expected here: \1"),
    (r"No such command '(.+?)'\.(.*)", r"\1: no such command\2"),
    (r"Invalid value for (?:'-\w' / )?'(.+?)'(?: / '.+?')?: (.+?)\.?", r"\1: \2"),
)


def _version(asked: bool) -> None:
    if asked:
        print(f"smolctl {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def application(commands: Iterable[str] = COMMANDS) -> typer.Typer:
    """The application with some of its `COMMANDS`: only these are imported, because imports take time."""
    app = typer.Typer(
        name="smolctl",
        help="Train, resume, sample, compare, quantize, benchmark, serve and publish small language models.",
        add_completion=True,
        rich_markup_mode=None,  # plain help: rich alone would take longer to load than everything else
        pretty_exceptions_enable=False,
        # Output's streams pass on only their own colours.
        context_settings={"help_option_names": ["-h", "--help"], "color": False},
    )
    app.callback()(_root)
    for command in commands:
        name = command.replace("-", "_")
        app.command(command, cls=PlainCommand)(getattr(import_module(f"smolctl.cli.{name}"), name))
    return app


def main() -> None:
    """Run the command line and exit with its code."""
    prepare_streams()
    if sys.platform == "win32":
        Output(json="--json" in sys.argv).error(
            InputError(
                "smolctl runs on Linux and macOS, not on Windows",
                "Install it in WSL 2 (Windows Subsystem for Linux).",
            )
        )
        sys.exit(ExitCode.BAD_INPUT)
    try:
        # A container sees all processors of its host: more threads than its share would wait for each other.
        if usable_cores() < usable_cpus():
            os.environ.setdefault("OMP_NUM_THREADS", str(compute_threads()))
        with sharing_cores(), answering() as completed:
            called = [name for name in (completed, *sys.argv[1:2]) if name in COMMANDS]
            asked = sys.argv[1:] or ["--help"]
            code = application(called or COMMANDS)(asked, prog_name="smolctl", standalone_mode=False)
    except Exception as error:
        # Typer's usage errors: the class is private, its interface is public.
        if not hasattr(error, "format_message"):
            raise
        Output(json="--json" in sys.argv).error(_usage_error(error))
        code = ExitCode.USAGE
    sys.exit(int(code or 0))


def _usage_error(error: Any) -> UsageError:
    """A usage error of Typer's with a remedy; of an option that does not exist, the one that was meant."""
    from difflib import get_close_matches  # imported for errors only

    from smolctl.outside import plain_reason

    # An option without its value is refused before there is a context.
    named = [name for name in sys.argv[1:2] if name in COMMANDS]
    context = getattr(error, "ctx", None)
    command = context.command_path if context else " ".join(["smolctl", *named])
    remedy = f"See {command} --help."
    said = plain_reason(str(error.format_message()))
    for theirs, ours in MESSAGES:
        said = re.sub(f"{theirs}\\Z", ours, said)
    if context is None or not hasattr(error, "possibilities"):
        said, meant, name = said.partition(" Did you mean ")
        return UsageError(said, f"Did you mean {name.replace(chr(39), '')} {remedy}" if meant else remedy)
    option, parameters = error.option_name, context.command.params
    later = [name for name in sys.argv[1:] if name in COMMANDS] if context.parent is None else []
    known = [name for one in parameters for name in (*one.opts, *one.secondary_opts) if name[:2] == "--"]
    near = [name for name in known if name.startswith(option) and option > "--"]
    near = near or get_close_matches(option, known, 2, 0.75)
    arguments = [one.metavar for one in parameters if one.param_type_name == "argument"]
    if instead := INSTEAD.get((context.info_name, option)):
        remedy = instead
    elif later:
        remedy = f"Options come after the command: smolctl {later[0]} {option}."
    elif near:
        remedy = f"Did you mean {' or '.join(near)}? {remedy}"
    elif option.strip("-") and any(name.lower().startswith(option.lstrip("-")) for name in arguments):
        remedy = f"{arguments[0]} is given without an option's name: {command} {arguments[0]}. {remedy}"
    return UsageError(f"{option}: no such option", remedy)
