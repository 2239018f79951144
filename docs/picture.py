"""Writes the picture of the live display: a real run's events in the real view, exported by rich as SVG.

smolctl train nano --json > events.jsonl
python docs/picture.py events.jsonl --step 320
"""

from __future__ import annotations

import argparse
import io
import json
import re
import time
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console

from smolctl.runs.events import Checkpoint, Event, Note, Prediction, Start, Step, Validation
from smolctl.views.training_display import RunState, TrainingDisplay

WIDTH, HEIGHT = 110, 32
TARGET = Path(__file__).parent / "images" / "training.svg"
EVENTS: dict[str, Any] = {one.event: one for one in (Note, Start, Step, Prediction, Validation, Checkpoint)}


def state_at(stream: Path, step: int) -> RunState:
    """What the display knew after a step.

    Args:
        stream: what `smolctl train --json` has printed.
        step: of the run.
    """
    state, now = RunState(), time.monotonic()
    seconds = {"start": 0.0}  # of training, when the newest event of each name came
    for line in stream.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        name = values.pop("event")
        if name not in EVENTS or values.get("step", 0) > step:
            break
        event: Event = TypeAdapter(EVENTS[name]).validate_python(values)
        state(event)
        if isinstance(event, Step):
            seconds["step"] = seconds.get("step", 0.0) + event.seconds
        seconds[name] = seconds.get("step", 0.0)
    state.note = ""
    state.at = {name: now - seconds["step"] + then for name, then in seconds.items()}
    return state


def main() -> None:
    """Draw the display of a run at a step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stream", type=Path)
    parser.add_argument("--step", type=int, required=True)
    asked = parser.parse_args()
    console = Console(
        record=True,
        width=WIDTH,
        height=HEIGHT,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    console.print(TrainingDisplay(state_at(asked.stream, asked.step)))
    picture = console.export_svg(title="smolctl train nano", unique_id="smolctl")
    # Without rich's web fonts: no reader's browser asks another host for them.
    TARGET.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
