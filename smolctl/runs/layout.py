"""The layout of a run folder: its files and their places.

config.yaml       the resolved config        checkpoints/step-000500.ckpt and final.ckpt
environment.json  machine and versions       tokenizer/
metrics.jsonl     steps and validations      lineage.json, of a branch
predictions.jsonl, predictions.md            quantized/, logs/
loss.png, report.html         tasks.json, of `smolctl eval`
"""

from __future__ import annotations

import re
from pathlib import Path

from smolctl.runs.checkpoint_file import CHECKPOINT_ENDINGS

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"
FINAL = "final.ckpt"
METRICS = "metrics.jsonl"
PREDICTIONS = "predictions.jsonl"
PREDICTIONS_PAGE = "predictions.md"
LOSS_CURVE = "loss.png"
REPORT = "report.html"
TASKS = "tasks.json"
LINEAGE = "lineage.json"
QUANTIZED = "quantized"
VERDICTS = f"{QUANTIZED}/verdict.json"
LOGS = "logs"
WANDB_ID = f"{LOGS}/wandb-id"
LOCK = ".lock"
KIND = "run"
# Everything that belongs to a run, in the form of `ownership.Record`: other files in its folder are not
# smolctl's.
FILES = (
    *(CONFIG, ENVIRONMENT, METRICS, PREDICTIONS, PREDICTIONS_PAGE, LOSS_CURVE, REPORT, TASKS, LINEAGE, LOCK),
    ".*.partial",
    *(f"{TOKENIZER}/{name}.json" for name in ("tokenizer", "tokenizer_config", "generation_config")),
    f"{TOKENIZER}/chat_template.jinja",
    *(f"{CHECKPOINTS}/{name}{end}" for name in ("step-*.ckpt", FINAL) for end in CHECKPOINT_ENDINGS),
    f"{CHECKPOINTS}/.*.partial",
    *(VERDICTS, f"{QUANTIZED}/*.gguf", f"{QUANTIZED}/*/"),
    *(WANDB_ID, *(f"{LOGS}/{name}/**" for name in ("csv", "tensorboard", "wandb", "trackio"))),
)


def is_run(path: Path) -> bool:
    """Whether a folder is a run: it has a config.yaml, and no Hugging Face config."""
    return (path / CONFIG).is_file() and not (path / "config.json").exists()


def checkpoint_name(step: int) -> str:
    """The name of the file with the checkpoint of a step."""
    return f"step-{step:06d}.ckpt"


def step_in_name(path: Path) -> int | None:
    """The step in a checkpoint's file name; None for a file with another name."""
    match = re.fullmatch(r"step-(\d+)\.ckpt", path.name)
    return int(match[1]) if match else None
