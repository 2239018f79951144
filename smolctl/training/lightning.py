"""Imports Lightning without torchmetrics, which Lightning imports but smolctl does not use.

torchmetrics and, through it, transformers take 1.3 s to import, a third of what `smolctl train` does before
its first step. Lightning itself needs only two base classes of it, to check whether a logged value is a
metric. All modules import Lightning's names from here, so that none of them imports it first.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType
from typing import Any


@contextmanager
def _without_torchmetrics() -> Iterator[None]:
    """Give Lightning two empty classes for `torchmetrics`; later imports get the real package."""
    if any(name in sys.modules for name in ("torchmetrics", "lightning")):
        yield
        return
    stand_in: Any = ModuleType("torchmetrics")
    stand_in.__spec__ = ModuleSpec("torchmetrics", None)
    stand_in.__version__ = version("torchmetrics")
    stand_in.Metric = type("Metric", (), {})
    stand_in.MetricCollection = type("MetricCollection", (), {})
    sys.modules["torchmetrics"] = stand_in
    try:
        yield
    finally:
        del sys.modules["torchmetrics"]


with _without_torchmetrics():
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
    from lightning.pytorch.plugins.io import CheckpointIO
    from lightning.pytorch.strategies import ParallelStrategy
    from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
    from lightning.pytorch.utilities import rank_zero_only

# Lightning's messages about devices and tips would disturb the display.
for _name in ("lightning.pytorch", "lightning.fabric", "lightning"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class _NoSignals(_SignalConnector):
    """Replaces Lightning's signal handlers, which communicate with other processes even during another
    communication.

    Under SLURM they also save a checkpoint into the working folder, from which later runs would start.
    """

    def register_signal_handlers(self) -> None:
        pass


class Trainer(pl.Trainer):
    """Lightning's Trainer, without its signal handlers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._signal_connector = _NoSignals(self)


__all__ = [
    "CSVLogger",
    "CheckpointIO",
    "LightningOptimizer",
    "Logger",
    "ParallelStrategy",
    "SLURMEnvironment",
    "TensorBoardLogger",
    "Trainer",
    "WandbLogger",
    "pl",
    "rank_zero_only",
]
