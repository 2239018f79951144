"""The static page as a folder: its code, the model in parts that can be checked, and what the page says."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import smolctl
from smolctl.errors import SmolError
from smolctl.generation.load import usable_settings
from smolctl.generation.sampling import settle
from smolctl.outside import read_json
from smolctl.ownership import RECORD
from smolctl.page.chat import chat_files, page_chat
from smolctl.page.layout import engine_layout
from smolctl.page.tokenization import page_tokenizer
from smolctl.sources.base import ModelSource
from smolctl.sources.huggingface.write import write_json
from smolctl.sources.open import open_source
from smolctl.sources.quantized_folder import FILE, read_description

CODE = Path(__file__).parent / "files"
ENGINES = tuple(
    Path(smolctl.__file__).parent / "native" / name for name in ("engine.wasm", "engine-threads.wasm")
)
PAGE, WEIGHTS = "page.json", "weights.json"
FORMAT, VERSION = "smolctl-page", 1
WEIGHTS_FORMAT, WEIGHTS_VERSION = "smolctl-weights", 1
# A part is what a visitor has to fetch again where one byte is wrong. Parts are whole files because requests
# for a range of bytes were reported to fail from a page at the Hub's storage.
PART_BYTES = 8 << 20
MAX_TOKENS = 256  # of an answer, where a visitor changes nothing
# What a visitor can ask a model that answers, and let one continue that does not.
QUESTIONS = (
    "What is the capital of France?",
    "Explain gravity in two sentences.",
    "Write a haiku about rain.",
)
BEGINNINGS = ("Once upon a time", "The capital of France is", "def fibonacci(n):")


@dataclass(frozen=True)
class PageModel:
    """A variant of the model that a visitor can choose."""

    folder: str  # beside page.json
    scheme: str
    bytes: int  # of the weights
    verdict: str | None  # what `quantize` measured; None: it was not measured


@dataclass(frozen=True)
class PageText:
    """What the page says about the model; all of it plain text."""

    title: str
    summary: str
    facts: Sequence[tuple[str, str]]  # label and value
    links: Sequence[tuple[str, str]]  # label and address
    examples: Sequence[str]


def write_page(
    folder: Path, quantized: Sequence[Path], text: PageText, verdicts: Mapping[str, str]
) -> tuple[PageModel, ...]:
    """Write the page into an existing folder.

    Args:
        folder: gets the page.
        quantized: folders that `quantize` wrote, of one model; the first is what visitors get by default.
        text: what the page says.
        verdicts: by scheme, where they were measured.

    Returns:
        The variants, the default first.

    Raises:
        InputError: the page cannot run such a model, or such a tokenizer.
        SmolError: this installation has no engine for browsers.
    """
    first = open_source(str(quantized[0]))
    tokenizer, chat = page_tokenizer(first), page_chat(first)  # what the page cannot follow is refused first
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
    """What `smolctl sample` takes where nobody says anything."""
    recommended, _ = usable_settings(source.require_tokenizer().recommended)
    return {**asdict(settle({}, recommended)), "max_tokens": MAX_TOKENS}


def update_text(folder: Path, text: PageText) -> None:
    """Say something else on a page that is written already."""
    path = folder / PAGE
    write_json(path, {**read_json(path), **asdict(text)})


def write_code(folder: Path) -> None:
    """Everything of the page that is the same for every model.

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
    """Cut the weights of a quantized folder into parts, and copy what else is in it.

    Raises:
        InputError: the page cannot run such a model.
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
