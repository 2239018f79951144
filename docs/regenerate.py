"""Writes the parts of README.md and docs/ that the program knows: tables of options, sessions, figures.

    python docs/regenerate.py                  tables, and sessions that print the same on every machine
    python docs/regenerate.py --real FOLDER    also the sessions of real runs, in FOLDER (half an hour)

`tests/test_docs.py` fails when what the first form writes is not what stands there.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from typer.main import get_command

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from docs.peer_table import peer_table  # noqa: E402
from smolctl.cli.main import application  # noqa: E402

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
RESULTS = ROOT / "benchmarks" / "results"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # the tests' copy, which the sessions use
# Commands whose output is the same on every machine.
EXACT = ("smolctl count-params ", "smolctl inspect-config ")
# Options of every command, which docs/commands/index.md explains.
COMMON = ("--json", "-q, --quiet", "-v, --verbose", "--debug", "--help")
BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
PART = re.compile(
    r"(<!-- (options|comparison|peers)(?: of ([a-z0-9-]+))? -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL
)

Run = Callable[[str], str]  # the output of a command line


def updated(
    text: str, run: Run, is_regenerated: Callable[[str], bool] = lambda line: line.startswith(EXACT)
) -> str:
    """A page with its generated parts written anew.

    Args:
        text: the page, in Markdown.
        run: gives the output of a command line.
        is_regenerated: which command lines are run; the output of others stays.
    """

    def output(shown: re.Match[str]) -> str:
        if not is_regenerated(shown[1]):
            return shown[0]
        lines = [line.rstrip() for line in run(shown[1]).rstrip().splitlines()]
        gap = "\n" if shown[2].endswith("\n\n") else ""  # before the next command
        return "".join(f"{line}\n" for line in (f"$ {shown[1]}", *lines)) + gap

    def part(match: re.Match[str]) -> str:
        kind, of = match[2], match[3]
        if kind == "peers":
            return match[1] + peer_table(_results(f"peers-{of}"))
        return match[1] + (option_table(of) if kind == "options" else comparison_table())

    return PART.sub(part, BLOCK.sub(lambda block: COMMAND.sub(output, block[0]), text))


@cache
def _commands() -> dict[str, Any]:
    commands: dict[str, Any] = vars(get_command(application()))["commands"]
    return commands


def options(command: str) -> Iterator[tuple[str, str]]:
    """The arguments and options of a command with what `--help` says about each, one line a piece."""
    found = _commands()[command]
    context = found.make_context(command, [], resilient_parsing=True)
    for parameter in found.get_params(context):
        if record := parameter.get_help_record(context):
            name, meaning = record
            yield name if name.startswith("-") else name.partition(" <")[0], meaning  # of arguments no types


def option_table(command: str) -> str:
    """The arguments and options of a command as a table in Markdown."""
    rows = [
        f"| {_code(name)} | {_cell(meaning)} |" for name, meaning in options(command) if name not in COMMON
    ]
    return "\n".join(["| argument or option | what it does |", "|---|---|", *rows])


def _code(text: str) -> str:
    """As code. A choice may break after each of its values, where a phone is too narrow for all of them."""
    choice = _cell(text).replace("&#124;", "&#124;<wbr>")
    return f"<code>{choice}</code>" if "|" in text else f"`{text}`"


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;").strip()


def comparison_table() -> str:
    """What was measured against other programs, as a table in Markdown."""
    rows = ["| what | compared with | times as fast | peak memory |", "|---|---|---|---|"]
    for one in _results("comparison"):
        memory = f"{one['memory']:.2f} ×" if one["memory"] else ""
        ratio = f"**{one['ratio']:.2f}** ({one['low']:.2f} to {one['high']:.2f})"
        rows.append(f"| {one['what']} | {one['against']} | {ratio} | {memory} |")
    return "\n".join(rows)


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def command_lines(text: str) -> Iterator[str]:
    """Every command line of smolctl that a page shows in its blocks of code, in one line each."""
    for block in re.findall(r"^```(?:bash|console)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for found in re.findall(r"(?:^(?:\$ )?|&& |srun |/bin/|-m )(smolctl [^#&;|>]+)", line):
                yield found.strip()


def _real_run(folder: Path) -> Run:
    """Runs command lines in a folder that has the files which the sessions name; it is made if need be."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",  # stdout and stderr in the order they were written
        "SMOLCTL_CACHE": "cache",  # empty, as on a new machine
    }

    def run(line: str) -> str:
        print(f"$ {line}", file=sys.stderr)
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{line}\nended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    if folder.exists():
        return run
    shutil.copytree(ROOT / "docs" / "examples", folder)
    (folder / GGUF).symlink_to(next((Path.home() / ".cache" / "smolctl-tests").rglob("*.gguf")))
    for scheme, out in (("gguf-q4_0", "SmolLM2-q4_0.gguf"), ("bf16", "SmolLM2-135M-Instruct-bf16")):
        run(f"smolctl quantize {GGUF} --to {scheme} --out {out} --no-measure")
    return run


def _exact_run(line: str) -> str:
    command = [str(Path(sys.executable).with_name("smolctl")), *line.split()[1:]]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    """Rewrite the pages that differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--real",
        type=Path,
        metavar="FOLDER",
        help="also run the sessions of real runs in this folder, new at first",
    )
    parser.add_argument("pages", nargs="*", type=Path, help="only these, in this order; default: all")
    asked = parser.parse_args()
    run = _real_run(asked.real.absolute()) if asked.real else _exact_run
    for page in [path.absolute() for path in asked.pages] or PAGES:
        before = page.read_text(encoding="utf-8")
        after = updated(before, run, lambda line: True) if asked.real else updated(before, run)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
