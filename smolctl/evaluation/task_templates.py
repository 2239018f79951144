"""Templates of lm-eval's tasks, within the limits of all templates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2

from smolctl.errors import InputError
from smolctl.outside import shown
from smolctl.templates import filled, with_limits

# Of a template's text: more tokens than any model here reads. lm-eval tokenizes it twice for each choice.
MOST_CHARACTERS = 1_000_000


def apply_template(template: str, item: Mapping[str, Any]) -> str:
    """Replaces lm-eval's function of this name.

    Args:
        template: Jinja source, as in a task's YAML file.
        item: of the task's data.

    Raises:
        InputError: the template fails, needs too much time or memory, or its text is too long.
    """
    text, fault = with_limits(fill, template, dict(item))
    if len(text) > MOST_CHARACTERS:
        fault = f"writes more than {MOST_CHARACTERS:,} characters"
    if fault:
        raise InputError(
            f"a task's template {shown(template)} {fault}", "Correct it in the task's YAML file."
        )
    return text


def fill(template: str, item: Mapping[str, Any]) -> tuple[str, str]:
    """The text of a template, and the error; see `filled`."""
    return filled(lambda: _compiled(template), item, MOST_CHARACTERS)


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    from lm_eval.utils import env  # with its own filters

    compiled: jinja2.Template = env.from_string(template)
    return compiled
