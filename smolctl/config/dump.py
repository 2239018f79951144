"""A `RunConfig` as YAML that `load_run_config` reads back to an equal one."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel

from smolctl.config.run import RunConfig

COMMENT_COLUMN = 40


def to_yaml(config: RunConfig) -> str:
    """Every key of a run, with its meaning as a comment where the schema states one."""
    sections = []
    for name, field in RunConfig.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            lines = [f"{name}:", *(_line(key, value, indent="  ") for key in type(value).model_fields)]
        else:
            lines = [*([f"# {field.description}"] if field.description else []), _pair(name, value)]
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _line(key: str, section: BaseModel, indent: str) -> str:
    pair = indent + _pair(key, getattr(section, key))
    description = type(section).model_fields[key].description
    return f"{pair:<{COMMENT_COLUMN}}  # {description}" if description else pair


def _pair(key: str, value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump({key: plain}, default_flow_style=None, width=10_000, allow_unicode=True)
    return text.rstrip("\n")
