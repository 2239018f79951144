"""The kinds of Space, for the command line: without heavy imports."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from smolctl.errors import UsageError

PAGE_SCHEMES = ("int8", "int4")


class Sdk(StrEnum):
    """The Hub's names of the kinds; free accounts can create only static ones."""

    STATIC = "static"
    GRADIO = "gradio"


def page_variants(schemes: Sequence[str]) -> tuple[str, ...]:
    """The schemes of the variants on a static page, without duplicates.

    Raises:
        UsageError: none is named, or one that the page does not support.
    """
    for scheme in schemes:
        if scheme not in PAGE_SCHEMES:
            raise UsageError(
                f"--page-schemes {scheme}: the page has {' and '.join(PAGE_SCHEMES)}", "Name one or both."
            )
    if not schemes:
        raise UsageError("--page-schemes is empty", f"There are {' and '.join(PAGE_SCHEMES)}.")
    return tuple(dict.fromkeys(schemes))
