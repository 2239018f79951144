"""Texts of both kinds of Space: about the model on the page, and about the Space in README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolctl.hub.connection import endpoint
from smolctl.hub.files import README
from smolctl.page.folder import BEGINNINGS, QUESTIONS
from smolctl.publish.card import merge_card
from smolctl.publish.card_text import CardFacts

EXAMPLES = 4


def write_space_card(
    folder: Path, facts: CardFacts, on_hub: str | None, decided: Mapping[str, Any], text: str
) -> None:
    """Write a Space's README.md, keeping people's text from the one on the Hub.

    Args:
        folder: of the Space.
        facts: of the model's card; its `repo` is the model's repository on the Hub.
        on_hub: the Space's current README.md.
        decided: front matter that the folder requires and that overrides people's values.
        text: Markdown below the title.
    """
    changeable: dict[str, Any] = {
        "title": facts.name,
        "emoji": "💬" if facts.can_chat else "✍️",
        "colorFrom": "indigo",
        "colorTo": "gray",
        "pinned": False,
        "short_description": f"A language model of {facts.size}",  # at most 60 characters
    }
    if facts.license:
        changeable["license"] = facts.license
    forced = {**decided, "models": [facts.repo]}
    card = merge_card({**changeable, **forced}, f"# {facts.name}\n\n{text}", on_hub, forced=forced)
    (folder / README).write_text(card, encoding="utf-8", newline="")


def summary(facts: CardFacts, markdown: bool = False) -> str:
    """Two or three sentences on the model in plain text, or in Markdown with a link to its base."""
    config = facts.config
    parts = [
        f"{facts.parameters:,} parameters",
        f"{config.num_hidden_layers} layers of {config.hidden_size}",
        f"context {config.max_position_embeddings:,}",
    ]
    if base := facts.base and facts.base.on_hub:
        link = f"[{base.id}]({endpoint()}/{base.id})"
        parts.append(f"made from {link if markdown else base.id}")
    if facts.run:
        parts.append(f"{facts.run.tokens:,} tokens seen")
        if facts.run.validations:
            parts.append(f"{facts.run.validations[-1]['bits_per_byte']:.3f} bits per byte on held-out text")
    kind = "It chats." if facts.can_chat else "It continues text; it was not taught to answer questions."
    return f"{' · '.join(parts)}. {kind} Small models make things up."


def model_link(facts: CardFacts) -> str:
    """A sentence of Markdown with a link to the model's repository, if it is known."""
    return f" Model: [{facts.repo}]({facts.url})" if facts.url else ""


def examples(facts: CardFacts) -> Sequence[str]:
    """The prompts of the run's predictions; questions for a chat model."""
    asked = facts.run and (not facts.can_chat or facts.run.config.data.format == "chat")
    if facts.run and asked and facts.run.histories:
        return list(facts.run.histories)[:EXAMPLES]
    return QUESTIONS if facts.can_chat else BEGINNINGS
