"""Conversations of a few invented words, in every shape, and runs on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smolctl.runs.events import Event
from smolctl.training.prepare import Prepared, prepare
from tests.support.tiny_runs import ROPE, tiny_config

WORDS = ("the cat", "a mat", "birds fly", "trees", "over", "and")
PAIRS = [(f"{one} {two}?", f"{two} saw {one}.") for one in WORDS for two in WORDS if one != two]
SHAPES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "messages": lambda q, a: {
        "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "completion": lambda q, a: {"prompt": q, "completion": a},
    "instruction": lambda q, a: {"instruction": q, "output": a},
}
CHAT: dict[str, Any] = {"format": "chat", "sequence_length": 96, "validation_fraction": 0.2}


def write_rows(path: Path, shape: str = "messages", pairs: list[tuple[str, str]] = PAIRS) -> Path:
    path.write_text("".join(f"{json.dumps(SHAPES[shape](*pair))}\n" for pair in pairs))
    return path


def prepare_chat(
    source: Path, events: list[Event] | None = None, train: dict[str, Any] | None = None, **data: Any
) -> Prepared:
    model = {"max_position_embeddings": 96, **ROPE}
    changes = {"data": {**CHAT, **data}, "train": train or {}, "validation": {"sequences": 8}}
    config = tiny_config(source, model=model, **changes)
    return prepare(config, None, (events if events is not None else []).append)
