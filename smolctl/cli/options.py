"""Options shared by several commands, and the wrapper of every command."""

from __future__ import annotations

import errno
import functools
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Container, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from smolctl.cli.completion import (
    LOGGERS,
    complete_model,
    complete_model_setting,
    complete_run_setting,
    complete_weights,
    names,
)
from smolctl.cores import compute_threads
from smolctl.durable import DISK_ERRORS
from smolctl.errors import RENAME, ExitCode, InputError, SettingError, SmolError, UsageError
from smolctl.escaping import is_utf8
from smolctl.mapped import exit_if_shortened
from smolctl.views.output import Output, abandon_stdout

Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON.", show_default=False)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print results and errors only.", show_default=False)
]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Print more messages.", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one key of the config; repeatable.",
        autocompletion=complete_run_setting,
    ),
]
ModelSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one key of the model's config; repeatable.",
        autocompletion=complete_model_setting,
    ),
]
# Settings of a run for which both `train` and `resume` have an option.
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Sequences per optimizer step.")]
MicroBatchSize = Annotated[
    int | None,
    typer.Option("--micro-batch-size", min=1, help="Sequences in memory at once; fewer need less memory."),
]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.")]
KeepLast = Annotated[
    int | None, typer.Option("--keep-last", min=0, help="Newest checkpoints to keep; 0 keeps all.")
]
KeepEvery = Annotated[
    int | None, typer.Option("--keep-every", min=0, help="Also keep checkpoints at multiples of this step.")
]
Devices = Annotated[int | None, typer.Option("--devices", min=1, help="Devices per machine.")]
NumNodes = Annotated[
    int | None,
    typer.Option("--num-nodes", min=1, help="Number of machines; start the run with torchrun or SLURM."),
]
Strategy = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        help="Strategy for several devices: auto or ddp.",
        autocompletion=names("auto", "ddp"),
    ),
]
Loggers = Annotated[
    list[str] | None,
    typer.Option(
        "--logger",
        metavar="NAME",
        help="Also log to csv, tensorboard, wandb or trackio; repeatable. 'none' disables other loggers.",
        show_default=False,
        autocompletion=names(*LOGGERS),
    ),
]
AcceptGuesses = Annotated[
    bool,
    typer.Option(
        "--accept-guesses",
        help="Accept and record the values that smolctl assumes where the model's config is incomplete.",
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Convert weights that are not quantized. Default: as stored in the file."),
]
KvCache = Annotated[
    Literal["auto", "int8"],
    typer.Option(
        "--kv-cache",
        help="Store attention keys and values in this format. auto: float16, or float32 for float32 weights"
        " and where float16 could overflow; int8: about half of float16's memory, slightly different logits.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="CPU threads, at most one per logical processor. Default: one per core."
    ),
]
# The setting for each option of `train` and `resume`, by parameter name.
RUN_SETTINGS = {
    "steps": "train.steps",
    "epochs": "train.epochs",
    "minutes": "train.minutes",
    "batch_size": "train.batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "seed": "train.seed",
    "data": "data.source",
    "strict": "data.strict",
    "tokenizer": "tokenizer",
    "learning_rate": "optimizer.learning_rate",
    "keep_last": "checkpoint.keep_last",
    "keep_every": "checkpoint.keep_every",
    "devices": "trainer.devices",
    "num_nodes": "trainer.num_nodes",
    "strategy": "trainer.strategy",
    "logger": "trainer.loggers",
}
WEIGHTS = "Run, RUN@STEP, RUN@best, .ckpt, folder, .safetensors, .gguf or Hub id"  # what MODEL may name
NEWEST = "Default: the newest run."
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Preset, YAML, Hub id, folder, .safetensors, .gguf, .ckpt, run, RUN@STEP or RUN@best.",
        show_default=False,
        autocompletion=complete_model,
    ),
]
ModelOrNewest = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=f"{WEIGHTS}. {NEWEST}",
        show_default=False,
        autocompletion=complete_weights,
    ),
]

TEXTS = {"prompt", "system", "stop"}  # parameters for which an empty text is valid
TYPE_NAMES = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}


def capped_threads(output: Output, asked: int | None) -> int | None:
    """The value of --threads, limited: more than there are processors only wait for each other, and very
    many crash.
    """
    used = None if asked is None else compute_threads(asked)
    if used != asked:
        output.message(f"--threads {asked}: there are {used} processors here, so {used} are used.")
    return used


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """Make a command of the application from a function of its `Output` and its own options.

    It also gets --json, --quiet, --verbose and --debug. Errors become two lines and an exit code, with a
    traceback only for --debug.
    """

    def run(
        *, json: Json = False, quiet: Quiet = False, verbose: Verbose = 0, debug: Debug = False, **asked: Any
    ) -> None:
        output = Output(json, quiet, verbose)
        try:
            _require_values(asked, names, texts)
            if json and sys.stdout is None:
                raise UsageError(
                    "stdout is closed, so the result cannot be written", "Send it to a file or a pipe."
                )
            exit_if_shortened(output.error)
            with output.quieting_libraries():
                code = function(output, **asked)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full disk gives an error, not at Python's exit
        except SmolError as error:
            if debug:
                raise
            named = _of_option(error, asked, names)
            output.error(named)
            code = named.exit_code
        except KeyboardInterrupt:
            code = ExitCode.INTERRUPTED
        except BrokenPipeError:
            abandon_stdout()
            code = ExitCode.DONE  # the reader of stdout has closed the pipe
        except Exception as error:
            if debug:
                raise
            known = _unexpected(error)
            output.error(known)
            code = known.exit_code
        if code:
            raise typer.Exit(int(code))

    # Typer makes an option of every parameter in the signature.
    _output, *own = inspect.signature(function, eval_str=True).parameters.values()
    *common, _asked = inspect.signature(run, eval_str=True).parameters.values()
    for parameter in own:
        _name_type(parameter.annotation)
    names = {parameter.name: _shown(parameter) for parameter in own}
    texts = TEXTS | {parameter.name for parameter in own if parameter.default is parameter.empty}
    functools.update_wrapper(run, function)
    run.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    return run


def _require_values(asked: Mapping[str, Any], names: Mapping[str, str], texts: Container[str]) -> None:
    """Refuse numbers that are not finite, and values that name nothing: "-" instead of a path, and the empty
    value of an unset shell variable, which would mean another run, the working folder, or weights from
    scratch. Names that are not UTF-8 are refused too: a run of such a name could be trained, but not read.

    Args:
        asked: values by parameter name.
        names: the parameters' names as the user writes them.
        texts: parameters that may be empty; if a required one is missing, the command reports that itself.

    Raises:
        UsageError: naming the option.
    """
    for key, value in asked.items():
        name = names[key]
        if value == Path("-"):
            raise UsageError(
                f"{name} -: this option takes a path, not stdin or stdout", f"Name one: {name} PATH."
            )
        given = value if isinstance(value, list) else [value]
        if key not in texts and "" in given:
            raise UsageError(f"{name} is empty", "Give it a value, or leave it out.")
        for one in given:
            if isinstance(one, float) and not math.isfinite(one):
                raise UsageError(
                    f"{name}: must be a finite number, got {one}", "Change the value and run again."
                )
            if isinstance(one, str | Path) and key not in TEXTS and not is_utf8(str(one)):
                raise UsageError(f"{name} {one}: not UTF-8", RENAME)


def _of_option(error: SmolError, asked: Mapping[str, Any], names: Mapping[str, str]) -> SmolError:
    """An error of a setting as one of the option that set it; any other error is returned unchanged.

    Args:
        error: of a command.
        asked: the command's values by parameter name.
        names: the parameters' names as the user writes them.
    """
    if not isinstance(error, SettingError):
        return error
    lengths = {"extra": "train.steps", "until": "train.steps"}  # of `resume`
    for parameter, key in (RUN_SETTINGS | lengths).items():
        if asked.get(parameter) is not None and f"{error.key}.".startswith(f"{key}."):
            return UsageError(f"{names[parameter]}: {error.reason}", error.hint)
    return error


def _shown(parameter: inspect.Parameter) -> str:
    """A parameter as the user writes it: `--lr` or `MODEL`."""
    _, info = get_args(parameter.annotation)[:2]
    if isinstance(info, OptionInfo):
        given = (info.default, *(info.param_decls or ()))  # Typer has the first name in the default's place
        own = f"--{parameter.name.replace('_', '-')}"
        return next((name for name in given if isinstance(name, str) and name.startswith("--")), own)
    return info.metavar or parameter.name.upper()


def _name_type(annotation: Any) -> None:
    """Show the values of an option as TEXT or [auto|off] in the help, instead of Typer's <str> and
    <auto|off>.
    """
    kind, info = get_args(annotation)[:2]
    if not isinstance(info, OptionInfo) or info.metavar is not None:
        return
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    choices = get_args(kind) if get_origin(kind) is Literal else kind if issubclass(kind, Enum) else ()
    info.metavar = f"[{'|'.join(choices)}]" if choices else TYPE_NAMES.get(kind)


# Values that name what is read or written. With two of them, one would silently be ignored.
ONE_ONLY = {"PATH", "FILE", "FOLDER", "MODEL", "OTHER", "ORG/NAME"}


class PlainCommand(TyperCommand):
    """A command whose help shows its arguments as MODEL, instead of Typer's {MODEL} and MODEL <str>.

    It refuses a second prompt, file or repository if only one is accepted. For settings such as --temperature
    the last one applies, so that an alias can be overridden.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        for option, times in Counter(self.make_parser(ctx).parse_args(list(args))[2]).items():
            is_one = option.name == "prompt" or option.metavar in ONE_ONLY
            takes_one = is_one and not getattr(option, "multiple", True)
            if times > 1 and takes_one and not ctx.resilient_parsing:
                ctx.fail(f"{option.opts[0]} was given {times} times, but takes one value.")
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            records = (
                one.get_help_record(ctx) for one in self.get_params(ctx) if one.param_type_name == kind
            )
            rows = [(name.partition(" <")[0], text) for name, text in filter(None, records)]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _unexpected(error: Exception) -> SmolError:
    """An unexpected error, except for a full disk under stdout, and files that cannot be used."""
    if isinstance(error, OSError) and error.filename is None and error.errno == errno.EIO:
        abandon_stdout()
        return SmolError(f"reading or writing failed ({error.strerror})", "Check the disks in use.")
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):  # from tempfile
        return SmolError("no folder for temporary files can be written", "Set TMPDIR to one with free space.")
    if isinstance(error, OSError) and error.filename is None and error.errno in DISK_ERRORS:
        abandon_stdout()
        return SmolError(
            f"the output cannot be written ({error.strerror})", "Write it to another file or device."
        )
    if isinstance(error, OSError) and error.filename is not None:
        said = f"{error.filename2 or error.filename}: {error.strerror}"  # the target of a copy
        if error.errno in DISK_ERRORS:
            return SmolError(said, "Check the permissions and the free space of its disk.")
        return InputError(said, "Check the path and its permissions.")
    reason = f"{type(error).__name__}: {error}"
    return SmolError(f"unexpected: {reason}", "Run again with --debug for the traceback.")


def run_changes(options: Mapping[str, Any]) -> dict[str, Any]:
    """The changes to a run from a command's options: {"steps": 5} as {"train": {"steps": 5}}."""
    from smolctl.config.load import nested

    given = {key: options.get(name) for name, key in RUN_SETTINGS.items()}
    if given["trainer.loggers"] == ["none"]:
        given["trainer.loggers"] = []
    return nested({key: value for key, value in given.items() if value is not None})
