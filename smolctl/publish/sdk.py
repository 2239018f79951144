"""What kinds of Space there are, for the command line: nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from smolctl.errors import UsageError

PAGE_SCHEMES = ("int8", "int4")


class Sdk(StrEnum):
    """What the Hub calls the kinds; free accounts can make static ones only."""

    STATIC = "static"
    GRADIO = "gradio"


def page_variants(schemes: Sequence[str]) -> tuple[str, ...]:
    """The schemes of the variants on a static page, each once.

    Raises:
        UsageError: none is named, or one that the page does not offer.
    """
    for scheme in schemes:
        if scheme not in PAGE_SCHEMES:
            raise UsageError(
                f"--page-schemes {scheme}: the page has {' and '.join(PAGE_SCHEMES)}", "Name one or both."
            )
    if not schemes:
        raise UsageError("--page-schemes is empty", f"There are {' and '.join(PAGE_SCHEMES)}.")
    return tuple(dict.fromkeys(schemes))
