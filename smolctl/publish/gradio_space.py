"""A Gradio Space as a folder: a page, its model, and all required code."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import smolctl
from smolctl.durable import write_json
from smolctl.ownership import RECORD
from smolctl.publish.app import FACTS, MODEL
from smolctl.publish.build import Built
from smolctl.publish.card_text import CardFacts
from smolctl.publish.space_model import write_space_model
from smolctl.publish.space_text import examples, model_link, summary, write_space_card
from smolctl.sources.huggingface.write import CODE

SPACE_SCHEME = "int8"
SDK_VERSION = "6.31.0"  # of Gradio; the Hub requires all three numbers
PYTHON_VERSION = "3.12"  # the Hub's default is older than required
# Requirements of `smolctl.publish.app` and a model in a folder, in versions that were tested together with
# those that the Hub adds: Gradio of sdk_version with the extras oauth and mcp, of which the second does not
# allow a newer pydantic, and `spaces`. Plain torch would install gigabytes of CUDA.
TORCH = "torch==2.13.0"
REQUIREMENTS = (
    "jinja2==3.1.6",
    "numpy==2.4.6",
    "pydantic==2.12.5",
    "pyyaml==6.0.3",
    "tokenizers==0.23.3",
)
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# Parts of the package to copy; of `publish` only the app and its model.
PARTS = ("config", "data", "generation", "hub", "model", "native", "runs", "sources")
SINGLE_FILES = (
    "__init__.py",
    "arithmetic.py",
    "cores.py",
    "durable.py",
    "errors.py",
    "extras.py",
    "escaping.py",
    "mapped.py",
    "outside.py",
    "ownership.py",
    "publish/__init__.py",
    "publish/app.py",
    "publish/space_endpoints.py",
    "templates.py",
    "timing.py",
    "worker.py",
)
SUFFIXES = {".py", ".c", ".h"}
NOT_NEEDED = {"hatch_hook.py", *(path.name for path in CODE.glob("*.py"))}
APP = '''\
"""The page of this Space. What it does is in smolctl/publish/app.py."""

from pathlib import Path

from smolctl.publish.app import main

main(Path(__file__).parent)
'''
HUB_MACHINE = ("linux", "x86_64")


def add_space(built: Built, folder: Path) -> None:
    """Write the Space into an empty folder, complete except for its card.

    Raises:
        SmolError: something cannot be written.
    """
    write_space_model(built, SPACE_SCHEME, folder / MODEL)
    (folder / MODEL / RECORD).unlink()  # it is part of the Space, whose record lists its files
    copy_package(folder / "smolctl")
    (folder / "app.py").write_text(APP, encoding="utf-8")
    (folder / "requirements.txt").write_text(requirements(), encoding="utf-8")
    _write_page(folder, built.card_facts(built.model.name, None))


def _write_page(folder: Path, facts: CardFacts) -> None:
    """Write the page's information about the model, with a link if the repository is known."""
    content = {"title": facts.name, "summary": _summary(facts), "examples": examples(facts)}
    write_json(folder / FACTS, content)


def copy_package(folder: Path) -> None:
    """Copy the parts of smolctl that the app needs, so that nothing has to be on a package index.

    The compiled engine is included if it was compiled for the Hub's machines, Linux on x86-64, because a
    Space has no build step. Each build is for a class of processors, and the Space chooses one when it
    starts; if none fits, PyTorch is used.
    """
    root = Path(smolctl.__file__).parent
    suffixes = SUFFIXES | {".so"} if (sys.platform, platform.machine()) == HUB_MACHINE else SUFFIXES
    sources = [root / name for name in SINGLE_FILES]
    for part in PARTS:
        sources += [path for path in (root / part).rglob("*") if path.suffix in suffixes]
    for source in sources:
        if source.is_file() and source.name not in NOT_NEEDED:
            target = folder / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def requirements() -> str:
    """requirements.txt, for the Space's CPU."""
    return "\n".join((f"--extra-index-url {TORCH_INDEX}", f"{TORCH}+cpu", *REQUIREMENTS)) + "\n"


def write_card(folder: Path, facts: CardFacts, on_hub: str | None) -> None:
    """Write the parts that depend on the destination: the page's information, and README.md. See
    `space.write_card`.
    """
    _write_page(folder, facts)
    decided = {
        "sdk": "gradio",
        "sdk_version": SDK_VERSION,
        "python_version": PYTHON_VERSION,
        "app_file": "app.py",
    }
    text = (
        f"{_summary(facts)}\n\n"
        "The page answers on the CPU of the Space, with the engine in `smolctl/`: a copy of parts of "
        f"smolctl {smolctl.__version__} (Apache-2.0).{_compiled(folder)}"
    )
    write_space_card(folder, facts, on_hub, decided, text)


def _compiled(folder: Path) -> str:
    """Description of the binaries in the folder."""
    if not any((folder / "smolctl" / "native").glob("*.so")):
        return " It runs on PyTorch: there was no compiled engine for the Hub's machines."
    return (
        " The `.so` files in `smolctl/native/` are its `forward.c`, compiled where this was pushed from; "
        "`python -m smolctl.native.build` rebuilds them. Where none of them runs, PyTorch "
        "is used, which is slower."
    )


def _summary(facts: CardFacts) -> str:
    """The facts of the card in one line of Markdown."""
    return f"{summary(facts, markdown=True)} It answers in {SPACE_SCHEME}.{model_link(facts)}"
