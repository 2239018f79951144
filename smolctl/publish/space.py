"""The two kinds of Space: a static page that runs the model in the browser, and a Gradio app on a server."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from smolctl.page.smoke import require_trial, try_page
from smolctl.publish import gradio_space, static_space
from smolctl.publish.build import Built
from smolctl.publish.card_text import CardFacts
from smolctl.publish.sdk import Sdk
from smolctl.publish.smoke import SmokeTest, require_gradio, smoke_test
from smolctl.publish.space_text import examples


def require_space(sdk: Sdk) -> None:
    """Check that a Space can be tried on this machine before it is pushed.

    Raises:
        SmolError: a requirement is not installed.
    """
    if sdk is Sdk.GRADIO:
        require_gradio()
    else:
        require_trial()


def add_space(built: Built, folder: Path, sdk: Sdk, schemes: Sequence[str], tried: bool) -> Built:
    """Write a Space into an empty folder, complete except for its card.

    Args:
        built: the built model.
        folder: of the Space.
        sdk: the kind of Space.
        schemes: of the variants on a static page; the first is the default.
        tried: whether it must answer a prompt on this machine.

    Raises:
        SmolError: it cannot be made, or does not answer.
    """
    if sdk is Sdk.GRADIO:
        gradio_space.add_space(built, folder)
        return replace(built, space=folder, smoke=smoke_test(folder) if tried else None)
    smoke = None
    with tempfile.TemporaryDirectory(prefix="smolctl-page-") as work:
        quantized, variants = static_space.add_space(built, folder, schemes, Path(work))
        if tried:
            prompt = examples(built.card_facts(built.model.name, None))[0]
            trial = try_page(folder, quantized[0], prompt)
            engine = f"the page in {trial.engine}, with this machine's tokens"
            smoke = SmokeTest(prompt, trial.text, trial.start_s, trial.answer_s, engine)
    return replace(built, space=folder, smoke=smoke, variants=variants)


def write_card(sdk: Sdk, folder: Path, facts: CardFacts, on_hub: str | None) -> None:
    """Write the parts that depend on the destination: the page's links, and README.md.

    Args:
        sdk: the kind of Space.
        folder: of the Space, from `add_space`.
        facts: of the model's card; its `repo` is the model's repository on the Hub.
        on_hub: the Space's current README.md.
    """
    kind = gradio_space if sdk is Sdk.GRADIO else static_space
    kind.write_card(folder, facts, on_hub)
