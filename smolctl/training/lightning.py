"""Lightning without torchmetrics, which it imports and which nothing here uses.

torchmetrics takes 1.3 s to import, transformers with it: a third of what `smolctl train` does before its
first step. Lightning itself needs its two base classes only, to see whether a logged value is a metric.
Every module takes Lightning's names from here, so that none of them imports it first.
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
    """Give Lightning two empty classes for `torchmetrics`; whoever imports it later gets the real one."""
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

# Lightning's own lines about devices and tips would cut through the display.
for _name in ("lightning.pytorch", "lightning.fabric", "lightning"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class _NoSignals(_SignalConnector):
    """Lightning's own handlers talk to the other processes while they may be in the middle of a talk.

    Under SLURM they also save a checkpoint into the working folder, from which later runs start.
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
