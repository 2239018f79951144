"""The facts in a run's files, for the card, and the records that are published with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from smolctl.config import RunConfig
from smolctl.config.data import DataConfig
from smolctl.config.dump import to_yaml
from smolctl.data.text import python_library
from smolctl.data.text.hub import DatasetName
from smolctl.durable import write_json, write_text
from smolctl.evaluation.task_record import RESULTS, RecordedTask, read_tasks
from smolctl.quantization.record import read_variants
from smolctl.runs.chart import draw_loss
from smolctl.runs.folder import RunFolder
from smolctl.runs.layout import (
    CONFIG,
    ENVIRONMENT,
    LOSS_CURVE,
    METRICS,
    PREDICTIONS,
    PREDICTIONS_PAGE,
    REPORT,
    TASKS,
)
from smolctl.runs.prediction_history import History, to_markdown
from smolctl.runs.records import keep_records
from smolctl.runs.report import to_html
from smolctl.sources.base import ModelSource

RECORDS = "training"  # the folder of the records in the repository


@dataclass(frozen=True)
class RunFacts:
    """A training run in numbers."""

    config: RunConfig
    step: int
    tokens: int
    seconds: float
    loss: float | None  # nats per token at the last step
    validations: tuple[Mapping[str, Any], ...] = ()
    histories: Mapping[str, History] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[RecordedTask, ...] = ()
    variants: tuple[Mapping[str, Any], ...] = ()
    curve: bool = False

    @property
    def hardware(self) -> str:
        """Devices and software of the run's sessions, as recorded and in order."""
        sessions = [*(self.environment.get("earlier") or ()), self.environment]
        return "; then ".join(dict.fromkeys(map(_hardware, sessions)))

    @property
    def datasets(self) -> tuple[str, ...]:
        """Hub ids of the data."""
        names = map(DatasetName.recorded, self.config.data.source)
        return tuple(name.repository for name in names if name)

    def public_data(self) -> DataConfig:
        """The data for publication: paths of this machine are reduced to their last part."""
        data = self.config.data
        names = tuple(public_source(source) for source in data.source)
        held_out = data.validation and public_source(data.validation)
        return data.model_copy(update={"source": names, "validation": held_out})

    def public_environment(self) -> dict[str, Any]:
        """The sessions' records for publication: paths of data are reduced to their last part."""
        earlier = [
            {key: value for key, value in session.items() if key != "data"}
            for session in self.environment.get("earlier") or ()
        ]
        lines = [str(line) for line in self.environment.get("data") or ()]
        for source in self.config.data.texts:
            lines = [line.replace(source, public_source(source)) for line in lines]
        return {**self.environment, "data": lines, **({"earlier": earlier} if earlier else {})}


def _hardware(environment: Mapping[str, Any]) -> str:
    devices = list(environment.get("devices") or ())
    if environment.get("device") == "cpu":  # other devices of the machine were not used
        devices = []
    threads = environment.get("threads")
    where = ", ".join(f"{devices.count(name)} × {name}" for name in dict.fromkeys(devices))
    if not where:
        where = f"CPU, {threads} threads" if threads else "CPU"
    torch = (environment.get("packages") or {}).get("torch")
    return f"{where}; PyTorch {torch}" if torch else where


def public_source(source: str) -> str:
    """A data source without this machine's folders."""
    is_public = source == python_library.NAME or DatasetName.recorded(source)
    return source if is_public else PurePath(source).name or "files"


def read_facts(source: ModelSource, folder: Path) -> RunFacts:
    """The facts of a run up to the published step."""
    assert source.run is not None
    step = source.step or 0
    run = RunFolder(folder)
    records = list(run.metrics(step))
    steps = [record for record in records if record["event"] == "step"]
    return RunFacts(
        config=source.run,
        step=step,
        tokens=steps[-1]["tokens"] if steps else step * source.run.tokens_per_step,
        seconds=sum(record["seconds"] for record in steps),
        loss=steps[-1]["loss"] if steps else None,
        validations=tuple(record for record in records if record["event"] == "validation"),
        histories=run.predictions(step),
        environment=run.environment(),
        tasks=tuple(read_tasks(folder, step)),
        variants=tuple(record for record in read_variants(folder) if record.get("step") == step),
        curve=bool(steps),
    )


def write_records(facts: RunFacts, run: Path, target: Path) -> None:
    """Write the loss curve and a folder with report, config, environment, metrics, predictions and tasks.

    They end at the published step, and contain no paths of this machine.
    """
    if facts.curve:
        draw_loss(RunFolder(run).metrics(facts.step), target / LOSS_CURVE)
    folder = target / RECORDS
    folder.mkdir()
    config = facts.config
    tokenizer = config.tokenizer
    if tokenizer and PurePath(tokenizer).is_absolute():
        tokenizer = PurePath(tokenizer).name
    origin = config.init_from and config.init_from.public()
    shown = config.model_copy(
        update={"data": facts.public_data(), "tokenizer": tokenizer, "init_from": origin}
    )
    write_text(folder / CONFIG, to_yaml(shown))
    environment = facts.public_environment() if facts.environment else {}
    if environment:
        write_json(folder / ENVIRONMENT, environment)
    metrics = RunFolder(run).metrics(facts.step)
    write_text(folder / REPORT, to_html(run.resolve().name, shown, metrics, facts.histories, environment))
    if facts.tasks:
        write_json(folder / TASKS, {RESULTS: facts.tasks})
    keep_records(run / METRICS, facts.step, folder / METRICS)
    if facts.histories:
        keep_records(run / PREDICTIONS, facts.step, folder / PREDICTIONS)
        write_text(folder / PREDICTIONS_PAGE, to_markdown(facts.histories))
