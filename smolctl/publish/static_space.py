"""A static Space as a folder: a page that runs the model in the visitor's browser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import smolctl
from smolctl.page.folder import PageModel, PageText, update_text, write_page
from smolctl.page.serve import ISOLATION
from smolctl.publish.build import Built
from smolctl.publish.card_text import CardFacts
from smolctl.publish.space_model import space_model
from smolctl.publish.space_text import examples, model_link, summary, write_space_card


def add_space(
    built: Built, folder: Path, schemes: Sequence[str], work: Path
) -> tuple[tuple[Path, ...], tuple[PageModel, ...]]:
    """Write the page into an empty folder, complete except for its links and README.md.

    Args:
        built: the built model.
        folder: for the page.
        schemes: of the variants that visitors can choose; the first is the default.
        work: folder for quantized models that the run does not have yet.

    Returns:
        The quantized folders that the page was made from, and the page's variants.

    Raises:
        InputError: the page cannot run the model, or its tokenizer.
        SmolError: something cannot be written.
    """
    quantized = tuple(space_model(built, scheme, work) for scheme in schemes)
    text = page_text(built.card_facts(built.model.name, None))
    return quantized, write_page(folder, quantized, text, verdicts(built))


def verdicts(built: Built) -> dict[str, str]:
    """The verdicts of `quantize` on the published step, by scheme."""
    records = built.facts.variants if built.facts else ()
    return {str(record["scheme"]): str(record["verdict"]) for record in records if record.get("verdict")}


def page_text(facts: CardFacts) -> PageText:
    """The page's text about the model."""
    return PageText(
        title=facts.name,
        summary=summary(facts),
        facts=list(_facts(facts)),
        links=[link for link in (("Model", facts.url), ("Code", facts.code or "")) if link[1]],
        examples=examples(facts),
    )


def _facts(facts: CardFacts) -> Iterator[tuple[str, str]]:
    config, run = facts.config, facts.run
    yield "Parameters", f"{facts.parameters:,}"
    yield "Shape", f"{facts.shape}: {config.num_hidden_layers} layers of {config.hidden_size:,}"
    yield "Context", f"{config.max_position_embeddings:,} tokens"
    if facts.base:
        yield "Made from", facts.base.id
    if run:
        yield "Trained on", f"{run.tokens:,} tokens in {run.step:,} steps"
        if run.validations:
            last = run.validations[-1]
            yield "Held-out text", f"{last['bits_per_byte']:.4f} bits per byte at step {last['step']:,}"
    yield "License", facts.license or "not stated"
    yield "Made with", f"smolctl {smolctl.__version__}"


def write_card(folder: Path, facts: CardFacts, on_hub: str | None) -> None:
    """Write the parts that depend on the destination: the page's links, and README.md. See
    `space.write_card`.
    """
    update_text(folder, page_text(facts))
    decided = {"sdk": "static", "app_file": "index.html", "custom_headers": dict(ISOLATION)}
    text = (
        f"{summary(facts, markdown=True)}{model_link(facts)}\n\n"
        "The page runs the model in the visitor's browser, and nothing that is typed leaves it. "
        f"`engine.wasm` is smolctl {smolctl.__version__}'s engine (Apache-2.0) as "
        "WebAssembly. Every static host can serve the folder: `python -m http.server` in a copy of it shows "
        "the same page."
    )
    write_space_card(folder, facts, on_hub, decided, text)
