"""The model card: a part generated from the run's files, within text written by people.

The generated part is between two comments and is rewritten at every push. Everything else, including metadata
values, belongs to the people who edit the card, on the Hub or in the run's folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from smolctl.config.dump import Dumper
from smolctl.errors import InputError
from smolctl.publish.licenses import require_license
from smolctl.sources.huggingface.card import read_metadata, split_card

BEGIN = "<!-- smolctl: generated from here on, rewritten at every push. Edit outside of these comments. -->"
END = "<!-- smolctl: end of the generated part -->"
_MARK = re.compile(r"<!--(?=\s*smolctl:)")
_GENERATED = re.compile(r"<!-- smolctl: generated.*?-->.*?<!-- smolctl: end.*?-->", re.DOTALL)
# Keys whose values on the Hub are lists that smolctl and people may extend.
UNITED = ("tags", "datasets", "base_model")
TEXTS = ("license", "library_name", "pipeline_tag", "license_name", "license_link")  # license: also a list
LISTS = (*UNITED, "language")  # or a single text


def merge_card(
    metadata: Mapping[str, Any],
    generated: str,
    existing: str | None,
    forced: Mapping[str, Any] | None = None,
) -> str:
    """The card with a new generated part.

    Args:
        metadata: for the front matter. An existing value of the same key takes precedence; lists of tags and
            datasets are merged.
        generated: Markdown.
        existing: the current card, if there is one.
        forced: metadata that takes precedence over the existing card's.

    Raises:
        InputError: the existing card's front matter is not a YAML mapping.
    """
    inner = _MARK.sub("< !--", generated.strip())  # a prompt may contain the marker that ends this part
    block = f"{BEGIN}\n\n{inner}\n\n{END}"
    if existing is None or not existing.strip():
        return f"{_front_matter({**metadata, **(forced or {})})}{block}\n"
    front, body = split_card(existing)
    theirs = read_metadata(front)
    merged = {**metadata, **theirs, **(forced or {})}
    for key in UNITED:
        if isinstance(theirs.get(key), list) and metadata.get(key):
            merged[key] = [*theirs[key], *(item for item in metadata[key] if item not in theirs[key])]
    head = front if merged == theirs else _front_matter(merged)
    if _GENERATED.search(body):
        return head + _GENERATED.sub(lambda _: block, body, count=1)
    return f"{head}{block}\n\n{body.lstrip()}"


def stated_license(text: str) -> str | None:
    """The license in a card's metadata.

    Raises:
        InputError: the metadata is not a YAML mapping.
    """
    value = read_metadata(split_card(text)[0]).get("license")
    return ", ".join(map(str, value)) if isinstance(value, list) else value and str(value)


def require_valid(metadata: Mapping[str, Any]) -> None:
    """Check the metadata like the Hub, as far as possible offline.

    Raises:
        InputError: it is not valid; names the key.
    """
    for key in (*TEXTS, *LISTS):
        value = metadata.get(key)
        listed = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not (value is None or isinstance(value, str) or (listed and (key in LISTS or key == "license"))):
            expected = "a text" if key in TEXTS else "a list of texts"
            raise InputError(
                f"README.md: {key} must be {expected}, got {value!r}", "Correct the card's metadata."
            )
    license = metadata.get("license")
    for one in license if isinstance(license, list) else filter(None, [license]):
        require_license(one, "README.md")
    if license == "other" and not metadata.get("license_name"):
        raise InputError(
            "README.md: license other needs license_name",
            "Add license_name and license_link to the metadata.",
        )


def _front_matter(metadata: Mapping[str, Any]) -> str:
    text = yaml.dump(dict(metadata), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{text}---\n\n"
