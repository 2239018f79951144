"""The static page as a folder: its code, the model in verifiable parts, and the page's texts."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import smolctl
from smolctl.durable import write_json
from smolctl.errors import SmolError
from smolctl.generation.load import usable_settings
from smolctl.generation.sampling import resolve_sampling
from smolctl.native.build import HERE, WASM_BUILDS
from smolctl.outside import read_json
from smolctl.ownership import RECORD
from smolctl.page.chat import chat_files, page_chat
from smolctl.page.layout import engine_layout
from smolctl.page.tokenization import page_tokenizer
from smolctl.sources.base import ModelSource
from smolctl.sources.open import open_source
from smolctl.sources.quantized_folder import FILE, read_description

CODE = Path(__file__).parent / "files"
ENGINES = tuple(HERE / name for name in WASM_BUILDS)
PAGE, WEIGHTS = "page.json", "weights.json"
FORMAT, VERSION = "smolctl-page", 1
WEIGHTS_FORMAT, WEIGHTS_VERSION = "smolctl-weights", 1
# A visitor has to download a part again if one byte is wrong. Parts are whole files because range requests
# from a page to the Hub's storage were reported to fail.
PART_BYTES = 8 << 20
MAX_TOKENS = 256  # of an answer, by default
# Example prompts: questions for a chat model, beginnings of texts for others.
QUESTIONS = (
    "What is the capital of France?",
    "Explain gravity in two sentences.",
    "Write a haiku about rain.",
)
BEGINNINGS = ("Once upon a time", "The capital of France is", "def fibonacci(n):")


@dataclass(frozen=True)
class PageModel:
    """A variant of the model that visitors can choose."""

    folder: str  # next to page.json
    scheme: str
    bytes: int  # of the weights
    verdict: str | None  # the verdict of `quantize`; None: not measured


@dataclass(frozen=True)
class PageText:
    """The page's text about the model, all of it plain text."""

    title: str
    summary: str
    facts: Sequence[tuple[str, str]]  # label and value
    links: Sequence[tuple[str, str]]  # label and URL
    examples: Sequence[str]


def write_page(
    folder: Path, quantized: Sequence[Path], text: PageText, verdicts: Mapping[str, str]
) -> tuple[PageModel, ...]:
    """Write the page into an existing folder.

    Args:
        folder: for the page.
        quantized: folders that `quantize` wrote, of one model; the first is the default.
        text: the page's text.
        verdicts: by scheme, if measured.

    Returns:
        The variants, the default first.

    Raises:
        InputError: the page cannot run this model or its tokenizer.
        SmolError: this installation has no engine for browsers.
    """
    first = open_source(str(quantized[0]))
    tokenizer, chat = page_tokenizer(first), page_chat(first)  # checked before anything is written
    write_code(folder)
    models = []
    for number, source in enumerate(quantized):
        description = read_description(source)
        scheme = str(description["scheme"])
        name = "model" if number == 0 else f"model-{scheme}"
        write_page_model(source, folder / name)
        models.append(PageModel(name, scheme, description["file"]["bytes"], verdicts.get(scheme)))
    for file, content in chat_files(chat).items():
        (folder / file).write_bytes(content)
    write_json(
        folder / PAGE,
        {
            "format": FORMAT,
            "version": VERSION,
            "smolctl": smolctl.__version__,
            **asdict(text),
            "context": first.require_config().max_position_embeddings,
            "models": [asdict(model) for model in models],
            "tokenizer": tokenizer,
            "chat": chat,
            "sampling": _sampling(first),
        },
    )
    return tuple(models)


def _sampling(source: ModelSource) -> dict[str, Any]:
    """The default settings of `smolctl sample`."""
    recommended, _ = usable_settings(source.require_tokenizer().recommended)
    return {**asdict(resolve_sampling({}, recommended)), "max_tokens": MAX_TOKENS}


def update_text(folder: Path, text: PageText) -> None:
    """Change the text of an existing page."""
    path = folder / PAGE
    write_json(path, {**read_json(path), **asdict(text)})


def write_code(folder: Path) -> None:
    """Write the files that are the same for every model.

    Raises:
        SmolError: this installation has no engine for browsers.
    """
    missing = [path.name for path in ENGINES if not path.is_file()]
    if missing:
        raise SmolError(
            f"this installation has no engine for browsers ({missing[0]} is missing)",
            "pip install ziglang && python -m smolctl.native.build",
        )
    for path in (*CODE.iterdir(), *ENGINES):
        shutil.copyfile(path, folder / path.name)


def write_page_model(quantized: Path, folder: Path) -> None:
    """Divide the weights of a quantized folder into parts, and copy the other files.

    Raises:
        InputError: the page cannot run this model.
    """
    layout = engine_layout(quantized)
    folder.mkdir()
    for path in quantized.iterdir():
        if path.is_file() and path.name not in (FILE, RECORD):
            shutil.copyfile(path, folder / path.name)
    whole = read_description(quantized)["file"]  # `engine_layout` has compared it with the file
    parts: list[dict[str, Any]] = []
    with (quantized / FILE).open("rb") as file:
        while part := file.read(PART_BYTES):
            name = f"part-{len(parts):02d}"
            (folder / name).write_bytes(part)
            parts.append({"file": name, "bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()})
    write_json(
        folder / WEIGHTS,
        {
            "format": WEIGHTS_FORMAT,
            "version": WEIGHTS_VERSION,
            "bytes": whole["bytes"],
            "sha256": whole["sha256"],
            "part_bytes": PART_BYTES,
            "parts": parts,
            "layout": layout,
        },
    )
