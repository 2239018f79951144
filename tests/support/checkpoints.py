"""Checkpoints of a tiny model, without a run behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from smolctl.config import RunConfig
from smolctl.model.weights import initialize

MODEL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
RUN = RunConfig.model_validate({"model": MODEL, "data": {"sequence_length": 32}})


def checkpoint_content(step: int = 500, prefix: str = "network.", **changed: Any) -> dict[str, Any]:
    state = initialize(RUN.model, seed=step).state_dict()
    return {
        "state_dict": {prefix + name: tensor for name, tensor in state.items()},
        "global_step": step,
        "hyper_parameters": {"config": RUN.model_dump(mode="json")},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        **changed,
    }


def save_checkpoint(path: Path, **changed: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint_content(**changed), path)
    return path
