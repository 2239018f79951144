"""A `RunConfig` as YAML, which `load_run_config` reads back to an equal one."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel

from smolctl.config.run import RunConfig
from smolctl.outside import YamlLoader

COMMENT_COLUMN = 40
LINE_LENGTH = 110


class Dumper(yaml.SafeDumper):
    """Quotes texts that `YamlLoader` would read as numbers, including "3e-4"."""

    yaml_implicit_resolvers = YamlLoader.yaml_implicit_resolvers


def to_yaml(config: RunConfig) -> str:
    """Every key of a run, with its meaning as a comment."""
    sections = []
    for name, field in RunConfig.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            fields = type(value).model_fields
            keys = [_lines(key, getattr(value, key), fields[key].description) for key in fields]
            sections.append("\n".join([f"{name}:", *keys]))
        else:
            sections.append(_lines(name, value, field.description, indent=""))
    return "\n\n".join(sections) + "\n"


def _lines(key: str, value: Any, description: str | None, indent: str = "  ") -> str:
    """One key, with its comment after it if it fits, otherwise above."""
    pair = f"{indent}{key}: {_written(value)}"
    if not description:
        return pair
    line = f"{pair:<{COMMENT_COLUMN}}  # {description}"
    return line if len(line) <= LINE_LENGTH else f"{indent}# {description}\n{pair}"


def _written(value: Any) -> str:
    """A value on one line of YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    if isinstance(value, BaseModel):
        plain = value.model_dump(mode="json", exclude_none=True)
    text: str = yaml.dump(plain, Dumper=Dumper, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").rstrip("\n")
