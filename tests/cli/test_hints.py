"""Every command and option that a message names exists: what a hint leads to can be typed."""

from __future__ import annotations

import ast
import errno
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from smolctl.cli.main import application
from smolctl.cli.options import command
from smolctl.errors import ExitCode
from smolctl.views.output import Output
from tests.support.processes import CHECKOUT, Smolctl

OPTION = re.compile(r"(?<![\w/-])--[a-z][a-z-]*(?![\w-])")
# Of SLURM, pip, TensorBoard and Trackio, and a colour of the Space's page.
OTHERS = {
    *("--ntasks", "--ntasks-per-node", "--extra-index-url", "--logdir", "--project"),
    *("--border-color-primary", "--include", "--local-dir", "--merge"),
}


@cache
def options() -> Mapping[str, set[str]]:
    """The options of every command; of the program itself under ""."""
    root: Any = typer.main.get_command(application())

    def of(command: Any) -> set[str]:
        both = (name for one in command.params for name in (*one.opts, *one.secondary_opts))
        return {"--help", *both}

    return {"": of(root), **{name: of(command) for name, command in root.commands.items()}}


def test_without_arguments_the_help_is_shown(smolctl: Smolctl) -> None:
    called = smolctl()
    assert (called.code, called.err) == (0, "")
    assert called.out == smolctl("--help").out


def test_without_a_run_push_asks_for_one_before_it_asks_for_a_login(
    smolctl: Smolctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    called = smolctl("push")
    assert called.code == 3
    assert "smolctl train nano" in called.err


@pytest.mark.parametrize("option", ["--steps", "--nope", "--steps=x"])
def test_a_wrong_option_leads_to_the_help_of_its_command(option: str, smolctl: Smolctl) -> None:
    called = smolctl("train", option)
    assert called.code == 2
    assert called.err.splitlines()[-1] == " hint: See smolctl train --help."


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("sample", "--temp", "0"), "Did you mean --temperature?"),
        (("sample", "--max-token=4"), "Did you mean --max-tokens?"),
        (("train", "--learning-rat", "1"), "Did you mean --learning-rate?"),
        (("sample", "--model", "x"), "MODEL is given without an option's name: smolctl sample MODEL."),
        (("sample", "-m", "x"), "MODEL is given without an option's name: smolctl sample MODEL."),
        (("resume", "--steps", "9"), "Use --until N for the last step, or --extra N for further steps."),
        (("resume", "--data", "x"), "smolctl train --init-from RUN --data"),
        (("resume", "--run", "x"), "RUN is given without an option's name: smolctl resume RUN."),
        (("--json", "sample"), "Options come after the command: smolctl sample --json."),
        (("-q", "inspect-config", "nano"), "Options come after the command: smolctl inspect-config -q."),
    ],
)
def test_an_option_that_does_not_exist_leads_to_the_one_that_was_meant(
    arguments: tuple[str, ...], hint: str, smolctl: Smolctl
) -> None:
    called = smolctl(*arguments)
    assert called.code == ExitCode.USAGE
    assert hint in called.err


def test_the_examples_of_a_help_can_be_pasted_and_fit_80_columns(
    smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    root: Any = typer.main.get_command(application())
    for name, one in root.commands.items():
        text = smolctl(name, "--help").out
        assert [line for line in text.splitlines() if len(line) > 80] == []
        examples = [line for line in text.splitlines() if line.startswith("  smolctl ")]
        assert examples
        for line in examples:
            words = shlex.split(line, comments=True)
            _, verb, *arguments = words[: words.index(">")] if ">" in words else words
            assert verb == name
            one.make_context(verb, arguments)  # raises where a word is no option, value or argument


@pytest.mark.parametrize(
    ("arguments", "twice"),
    [
        (("sample", "--prompt", "a", "--prompt", "b"), "--prompt"),
        (("sample", "--prompt=a", "-p", "b"), "--prompt"),
        (("quantize", "nano", "--out", "a", "--out=b"), "--out"),
        (("inspect-config", "nano", "--against", "a", "--against", "b"), "--against"),
        (("push", "--page", "a", "--page", "b"), "--page"),
        (("push", "--repo", "me/a", "--repo", "me/b"), "--repo"),
        (("sample", "--json-schema", "a", "--json-schema", "b"), "--json-schema"),
    ],
)
def test_a_second_prompt_file_or_format_is_refused_where_one_is_taken(
    arguments: tuple[str, ...], twice: str, smolctl: Smolctl
) -> None:
    called = smolctl(*arguments)
    assert called.code == ExitCode.USAGE
    assert called.err.startswith(f"error: {twice} was given 2 times")


def test_flags_repeatable_options_and_settings_may_be_given_again(smolctl: Smolctl) -> None:
    called = smolctl("count-params", "nano", "--set", "num_hidden_layers=1", "--set", "vocab_size=300", "-qq")
    assert (called.code, called.err) == (0, "")
    called = smolctl("train", "--dry-run", "--steps", "1", "--steps", "x")
    assert "--steps: must be a valid integer\n" in called.err  # the last one applies


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("count-params",), "MODEL is missing"),
        (("train", "--steps"), "--steps has no value"),
        (("train", "nano", "more", "words"), "no argument is expected here: more words"),
        (("trian",), "trian: no such command"),
        (("train", "--stepz", "3"), "--stepz: no such option"),
        (("sample", "-n", "x"), "--samples: must be a valid integer"),
        (("sample", "--kv-cache", "int4"), "--kv-cache: 'int4' is not one of 'auto', 'int8'"),
        # What the config refuses is refused under the name that the user wrote.
        (("train", "nano", "--dry-run", "--strategy", "x"), "--strategy: must be 'auto' or 'ddp', got 'x'"),
        (("train", "nano", "--dry-run", "--epochs", "-1"), "--epochs: must be greater than 0, got -1.0"),
        (("train", "nano", "--dry-run", "--logger", "x"), "--logger: must be 'csv', 'tensorboard', "),
    ],
)
def test_a_usage_error_begins_with_what_is_wrong_and_ends_without_a_full_stop(
    arguments: tuple[str, ...], cause: str, smolctl: Smolctl
) -> None:
    called = smolctl(*arguments)
    said, hint = called.err.splitlines()
    assert called.code == ExitCode.USAGE
    assert said.startswith(f"error: {cause}")
    assert said[-1] != "."
    assert "trian" not in said or hint.startswith(" hint: Did you mean train? ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "nowhere", "--prompt", "a"),
        ("serve", "nowhere"),
        ("quantize", "nowhere"),
        ("compare", "nowhere", "nan"),
        ("push", "smolm2-135m", "--dry-run"),
        ("quantize", "./nowhere"),
        ("train", "nano", "--init-from", "nowhere", "--dry-run"),
    ],
)
def test_where_weights_are_needed_no_preset_is_offered(
    arguments: tuple[str, ...], smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    called = smolctl(*arguments)
    said, hint = called.err.splitlines()[-2:]
    assert called.code == ExitCode.BAD_INPUT, called.err
    assert said.startswith("error: ")
    assert (
        hint == " hint: Name a run, a checkpoint, a folder, a GGUF or a Hub id; `smolctl train` makes a run."
    )


@pytest.mark.parametrize("setting", [("--data", "nowhere.txt"), ("--set", "data.validation=nowhere.txt")])
def test_a_missing_text_is_refused_before_a_tokenizer_is_trained(
    setting: tuple[str, str], smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    called = smolctl("train", "nano", "--dry-run", *setting)
    assert called.code == ExitCode.BAD_INPUT, called.err
    assert "nowhere.txt" in called.err
    assert "Training a tokenizer" not in called.out + called.err


def test_a_setting_keeps_its_own_name_in_an_error(smolctl: Smolctl) -> None:
    called = smolctl("train", "nano", "--dry-run", "--strategy", "ddp", "--set", "train.steps=0")
    assert called.code == ExitCode.BAD_INPUT
    assert called.err.startswith("error: nano: train.steps: must be")


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "modle.gguf", "--prompt", "a"),
        ("count-params", "./modle.gguf"),
        ("compare", "modle.gguf", "model.gguf"),
        ("train", "modle.yaml", "--dry-run"),
        ("train", "nano", "--tokenizer", "train:300", "--dry-run", "--data", "modle.txt"),
        ("sample", "model.gguf", "--jsonl", "modle.jsonl"),
    ],
)
def test_a_file_of_a_similar_name_is_suggested(
    arguments: tuple[str, ...], smolctl: Smolctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = next(Path(word).name for word in arguments if "modle" in word)
    Path(wrong.replace("modle", "model")).touch()
    called = smolctl(*arguments)
    assert called.code == ExitCode.BAD_INPUT
    assert f" hint: Did you mean {wrong.replace('modle', 'model')}? " in called.err


@pytest.mark.parametrize(
    "options", [("--repo", "me"), ("--space", "me"), ("--gguf", "q4_k"), ("--license", "mitt")]
)
def test_a_push_refuses_wrong_options_before_it_asks_for_a_login(
    options: tuple[str, str], smolctl: Smolctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    called = smolctl("push", "nano", *options)
    assert called.code == ExitCode.USAGE
    assert options[1] in called.err


def test_every_command_that_takes_weights_names_the_same_kinds() -> None:
    root: Any = typer.main.get_command(application())
    for name in ("sample", "serve", "compare", "eval", "quantize", "bench", "push"):
        (argument,) = (one for one in root.commands[name].params if one.metavar == "MODEL")
        said = argument.help.lower()
        assert "run, run@step, run@best, .ckpt, folder, .safetensors, .gguf or hub id" in said, name


@pytest.mark.parametrize(
    "arguments",
    [("quantize", "--out"), ("train", "nano", "--dry-run", "--out"), ("sample", "--resume-output")],
)
def test_a_dash_is_no_path(
    arguments: tuple[str, ...], smolctl: Smolctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    called = smolctl(*arguments, "-")
    assert called.code == ExitCode.USAGE
    assert called.err.startswith(f"error: {arguments[-1]} -: this option takes a path")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("train", "", "--dry-run"), "CONFIG"),
        (("train", "nano", "--dry-run", "--init-from", ""), "--init-from"),
        (("train", "nano", "--dry-run", "--data", "configs", "--data", ""), "--data"),
        (("train", "nano", "--dry-run", "--set", ""), "--set"),
        (("resume", ""), "RUN"),
        (("push", ""), "MODEL"),
        (("serve", "--api-key", ""), "--api-key"),
    ],
)
def test_an_empty_value_is_not_the_default(arguments: tuple[str, ...], name: str, smolctl: Smolctl) -> None:
    called = smolctl(*arguments)
    assert called.code == ExitCode.USAGE
    assert called.err.startswith(f"error: {name} is empty\n")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("sample", "a\udcff.gguf"), "MODEL"),
        (("train", "nano", "--out", "a\udcff"), "--out"),
        (("train", "nano", "--data", "corpus", "--data", "a\udcff"), "--data"),
        (("push", "nano", "--local-dir", "a\udcff"), "--local-dir"),
    ],
)
def test_a_name_that_is_not_utf8_is_refused_before_anything_is_written(
    arguments: tuple[str, ...], name: str, smolctl: Smolctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    called = smolctl(*arguments)
    assert called.code == ExitCode.USAGE
    assert called.err.startswith(f"error: {name} ")
    assert "not UTF-8\n hint: Use a name in UTF-8" in called.err
    assert not list(tmp_path.iterdir())


def test_a_working_folder_that_is_not_utf8_is_named_where_it_matters(
    here: Path, smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "a\udcff").mkdir()
    (here / "a\udcff/notes.txt").write_text("the cat")
    monkeypatch.chdir(here / "a\udcff")
    assert smolctl("sample", "../runs/llama", "--prompt", "the", "--max-tokens", 1).code == 0
    for code, *arguments in (
        (3, "train", "nano", "--data", "notes.txt", "--dry-run"),
        (2, "push", "../runs/llama", "--local-dir", "out"),
    ):
        called = smolctl(*arguments)
        assert called.code == code, called.err
        assert "not UTF-8\n hint: Use a name in UTF-8" in called.err


def test_what_must_be_given_is_marked_in_the_help(smolctl: Smolctl) -> None:
    help_text = " ".join(smolctl("eval", "--help").out.split())
    assert re.search(r"--tasks [^[]*\[required\]", help_text)
    called = smolctl("eval", "runs/latest")
    assert (called.code, called.err.splitlines()[0]) == (2, "error: --tasks is missing")


@pytest.mark.parametrize("name", ["x" * 300, "folder", "file/below"])
def test_a_path_that_cannot_be_used_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()

    @command
    def write(output: Output) -> None:
        (tmp_path / name).write_text("")

    with pytest.raises(typer.Exit) as ended:
        write()
    assert ended.value.exit_code == ExitCode.BAD_INPUT
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause.startswith(f"error: {tmp_path / name}: ")
    assert remedy == " hint: Check the path and its permissions."


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The strings of a module that are no docstrings; of an f-string with a word in place of every value."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in node.values}
            constants = (value.value if isinstance(value, ast.Constant) else "VALUE" for value in node.values)
            yield node.lineno, "".join(map(str, constants))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in {*docstrings, *parts}
        ):
            yield node.lineno, node.value


def messages() -> list[tuple[str, str]]:
    found = []
    for path in sorted((CHECKOUT / "smolctl").rglob("*.py")):
        for line, text in texts(ast.parse(path.read_text(encoding="utf-8"))):
            if " " in text.strip():
                found.append((f"{path.relative_to(CHECKOUT)}:{line}", text))
    return found


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ENOTDIR])
def test_a_file_that_nobody_expected_to_fail_is_named_with_its_reason(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def fail(output: Output) -> None:
        raise OSError(number, os.strerror(number), "made/weights.json", None, "model/weights.json")

    with pytest.raises(typer.Exit):
        fail()
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause == f"error: model/weights.json: {os.strerror(number)}"
    assert "hint: Check the" in remedy


def test_every_command_that_a_message_names_exists() -> None:
    wrong, seen = [], 0
    for place, text in messages():
        for quoted in re.findall(r"`(smolctl [^`]*)`", text):
            seen += 1
            name = [*quoted.split(), ""][1]
            known = options().get(name, set())
            named = re.findall(r"(?<![\w-])--?[a-z][a-z-]*", quoted)
            if name not in options() or not set(named) <= known:
                wrong.append(f"{place}: {quoted}")
    assert wrong == []
    assert seen > 8


def test_every_option_that_a_message_names_exists() -> None:
    every = OTHERS.union(*options().values())
    wrong, seen = [], 0
    for place, text in messages():
        for option in OPTION.findall(text):
            seen += 1
            if option not in every:
                wrong.append(f"{place}: {option}")
    assert wrong == []
    assert seen > 40


@pytest.mark.parametrize("hint", ["Run `smolctl fix`.", "`smolctl bench --sav x`"])
def test_a_hint_to_nothing_would_be_found(hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cli.test_hints.messages", lambda: [("here", hint)] * 9)
    with pytest.raises(AssertionError):
        test_every_command_that_a_message_names_exists()


ROOT: Any = typer.main.get_command(application())
NUMBERS = [
    (name, option.opts[0])
    for name, one in ROOT.commands.items()
    for option in one.params
    if option.param_type_name == "option" and option.metavar in ("NUMBER", "DAYS")
]


def test_numbers_has_the_options_of_every_command() -> None:
    assert {"train", "resume", "sample", "serve", "eval", "quantize", "bench", "cache"} <= dict(
        NUMBERS
    ).keys()


@pytest.mark.parametrize(("command", "option"), NUMBERS)
@pytest.mark.parametrize("value", ["inf", "1e400"])
def test_a_number_that_is_not_finite_is_refused_under_the_name_of_its_option(
    command: str, option: str, value: str, smolctl: Smolctl
) -> None:
    called = smolctl(command, *(("--tasks", "x") if command == "eval" else ()), option, value)
    assert called.code == 2
    assert called.err.startswith(f"error: {option}: must be a finite number, got inf")


def test_numbers_of_other_scripts_and_absurd_ones_are_refused_under_the_name_of_their_option(
    smolctl: Smolctl,
) -> None:
    for option in ("--lr", "--learning-rate"):
        assert smolctl("train", "nano", option, "١٢").err.startswith(
            "error: --learning-rate: must be a valid"
        )
    for option in ("--devices", "--num-nodes", "--steps", "--batch-size"):
        called = smolctl("train", "nano", "--dry-run", option, 10**30)
        assert called.code == 2
        assert called.err.startswith(f"error: {option}: must be")
