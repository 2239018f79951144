"""`smolctl eval`: tasks of lm-eval (EleutherAI's lm-evaluation-harness) on smolctl's engine."""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from smolctl.errors import HubError, InputError, SmolError, UsageError
from smolctl.evaluation.task_record import record_tasks
from smolctl.evaluation.task_templates import apply_template
from smolctl.extras import missing_package
from smolctl.generation.engines import EngineOptions
from smolctl.generation.load import load_model
from smolctl.hub.errors import first_line
from smolctl.outside import path_meant, shown
from smolctl.runs.layout import TASKS
from smolctl.sources import open_weights

LIBRARY = "lm_eval"
# The parts of lm-eval's results that its users know and programs read.
KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")


@dataclass(frozen=True)
class TaskOptions:
    """Options of a call."""

    tasks: tuple[str, ...]  # names that lm-eval knows, YAML files, folders of them
    shots: int | None = None  # examples before each question; None: the task's default
    limit: float | None = None  # maximum items per task; below 1: a share of them
    chat: bool = False  # ask in the model's chat template
    system: str | None = None  # system message in front of each question
    generation: str | None = None  # key=value,… for tasks with generated answers
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass(frozen=True)
class TaskMetric:
    """One figure of a task."""

    name: str
    filter: str  # the processing of an answer before it was scored; "none": none
    value: float
    standard_error: float | None  # over the items
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResult:
    """A task, or a group of them, with its figures."""

    task: str
    version: str
    shots: int | None
    items: int  # number of evaluated items
    metrics: tuple[TaskMetric, ...]


@dataclass(frozen=True)
class TaskReport:
    """The results of a call."""

    model: str
    step: int | None  # of a run
    run: Path | None  # its folder
    engine: str
    library: str  # lm-eval's version
    chat: bool
    limit: float | None
    seconds: float  # without loading
    truncated: int  # requests that were truncated at the start to fit the model's context
    tasks: tuple[TaskResult, ...]
    document: Mapping[str, Any]  # `KEPT` parts of lm-eval's results
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = field(repr=False)  # every item with its answers


def evaluate_tasks(
    model: str, options: TaskOptions, note: Callable[[str], None] = lambda _text: None
) -> TaskReport:
    """Evaluate a model on some tasks.

    Args:
        model: any MODEL with weights and a tokenizer.
        options: the tasks, and how their questions are asked.
        note: called with each line of progress.

    Raises:
        MissingPackageError: lm-eval is not installed.
        InputError: a task is unknown or broken, or the model cannot be read.
        HubError: a task's data cannot be downloaded.
    """
    if find_spec(LIBRARY) is None:
        raise missing_package("lm-eval", "eval")
    with _explained(options):
        manager, names = _find_tasks(options.tasks)
    source = open_weights(model)
    loaded = load_model(model, options.engine)
    if options.chat and not loaded.can_chat:
        raise InputError(f"{model}: the model has no chat template", "Leave out --apply-chat-template.")
    from smolctl.evaluation.harness import EngineLM

    asked = EngineLM(loaded, note)
    started = time.perf_counter()
    with _explained(options):
        tasks = manager.load(names)
        for name, task in tasks["tasks"].items():
            _require_sound(name, task, options)
        found = _ask(asked, tasks, options)
    if asked.truncated:
        note(f"{asked.truncated:,} requests did not fit {loaded.context:,} tokens: cut at the beginning.")
    results = tuple(one for name in found["results"] if (one := _result(name, found)).metrics)
    if not results:
        raise InputError(
            f"{', '.join(options.tasks)}: the task has no metric to show",
            "Add a metric_list to its YAML file.",
        )
    return TaskReport(
        model=model,
        step=source.step,
        run=run.path if (run := source.run_folder) else None,
        engine=loaded.engine.name,
        library=version(LIBRARY),
        chat=options.chat,
        limit=options.limit,
        seconds=time.perf_counter() - started,
        truncated=asked.truncated,
        tasks=results,
        document={key: _plain(found[key]) for key in KEPT if key in found},
        samples=_plain(found["samples"]),
    )


def record_report(report: TaskReport) -> Path | None:
    """Add the results to the record of the evaluated run; None: the model is not a run.

    Raises:
        SmolError: the record cannot be written.
    """
    if report.run is None:
        return None
    how = {"step": report.step, "limit": report.limit, "chat": report.chat, LIBRARY: report.library}
    path = report.run / TASKS
    try:
        record_tasks(report.run, [asdict(task) | how for task in report.tasks])
    except OSError as error:
        raise SmolError(
            f"{path}: cannot be written ({error.strerror})", "The results are above; the run was not changed."
        ) from None
    return path


def _ask(model: Any, tasks: Mapping[str, Any], options: TaskOptions) -> Mapping[str, Any]:
    """Like lm-eval's `simple_evaluate`, without its queries of git and of all installed packages."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import simple_parse_args_string

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    for task in tasks["tasks"].values():
        if options.generation and task.get_config("output_type") == "generate_until":
            settings = simple_parse_args_string(options.generation)
            task.set_config(key="generation_kwargs", value=settings, update=True)
        own = task.get_config("num_fewshot")
        if own != 0:  # 0 means that the task has no examples
            task.set_config(key="num_fewshot", value=(own or 0) if options.shots is None else options.shots)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    found: Mapping[str, Any] = evaluate(
        lm=model,
        task_dict=tasks,
        limit=options.limit,
        apply_chat_template=options.chat,
        fewshot_as_multiturn=options.chat,
        system_instruction=options.system,
    )
    return found


def _require_sound(name: str, task: Any, options: TaskOptions) -> None:
    """Refuse tasks on which lm-eval would fail without an explanation. Raises InputError: naming the key."""
    # A task of another class is written in Python, with methods instead of keys.
    if type(task).__name__ == "ConfigurableTask":
        keys = ["output_type", "doc_to_text", "doc_to_target"]
        keys += ["doc_to_choice"] * (task.get_config("output_type") == "multiple_choice")
        if lacking := [key for key in keys if task.get_config(key) is None]:
            raise InputError(f"{name}: the task has no {lacking[0]}", "Add it to its YAML file.")
    shots = task.get_config("num_fewshot")
    if shots is not None and (type(shots) is not int or shots < 0):
        raise InputError(f"{name}: num_fewshot is {shown(shots)}", "Use a whole number from 0.")
    asked = shots if options.shots is None or shots == 0 else options.shots
    examples = (task.fewshot_docs() if asked else None) or ()
    if asked and asked > (count := len(examples if isinstance(examples, Sized) else list(examples))):
        raise InputError(
            f"{name}: {asked:,} examples are asked for, and the task has {count:,}",
            "Use a smaller --num-fewshot.",
        )
    if not len(task.eval_docs):
        raise _no_items(name)


def _no_items(name: str) -> InputError:
    return InputError(f"{name}: the task has no items", "Name data with items in its YAML file.")


def _find_tasks(asked: Sequence[str]) -> tuple[Any, list[str]]:
    """lm-eval's task manager, and the tasks by their names and paths.

    To look up a name, lm-eval reads all of its 15,000 YAML files, which takes seconds.
    """
    from lm_eval.tasks import TaskManager

    parts = [part for one in asked for part in one.split(",") if part]
    if not parts:
        raise UsageError("no task is named", "Name one with --tasks.")
    folders = [part for part in parts if Path(part).is_dir()]
    others = [part for part in parts if part not in folders]
    files = [part for part in others if Path(part).suffix in (".yaml", ".yml") or "/" in part]
    by_name = [part for part in others if part not in files]
    found = [str(Path(file).absolute()) for file in files]
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"{file}: no such file", f"{path_meant(Path(file))}Name a YAML file of a task.")
    for folder in folders:
        inside = TaskManager(include_path=folder, include_defaults=False).all_subtasks
        if not inside:
            raise InputError(
                f"{folder}: contains no task", "Name a folder with YAML files of lm-eval's tasks."
            )
        found += inside
    manager = TaskManager(include_path=folders or None, include_defaults=bool(by_name))
    for name in by_name:
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"Did you mean {' or '.join(near)}?" if near else "Name one of lm-eval's, or a YAML file."
            raise InputError(f"{name}: lm-eval has no such task", hint)
        found += matches
    return manager, list(dict.fromkeys(found))


@contextlib.contextmanager
def _explained(options: TaskOptions) -> Iterator[None]:
    """Run lm-eval without progress bars and warnings, with its prints on stderr, and explain its
    exceptions.
    """
    import datasets
    import lm_eval.api.task as module
    from huggingface_hub.errors import HfHubHTTPError
    from lm_eval import utils

    logger, bars = logging.getLogger(LIBRARY), module.tqdm
    level = logger.level
    datasets.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    module.tqdm = partial(bars, disable=True)
    fill, utils.apply_template = utils.apply_template, apply_template
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except SmolError:
        raise
    except (ConnectionError, HfHubHTTPError, datasets.exceptions.DatasetNotFoundError) as error:
        raise HubError(
            f"the data of a task is not available: {first_line(error)}",
            "Check its name and the network, or use a task with your own data.",
        ) from error
    except Exception as error:  # a task is a program: it raises whatever it likes
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):  # of `datasets`
            raise _no_items(", ".join(options.tasks)) from error
        said = dict.fromkeys((type(error).__name__, first_line(error)))
        raise InputError(
            f"{', '.join(options.tasks)}: lm-eval failed with {': '.join(said)}",
            "Correct the task; --debug shows where it stopped.",
        ) from error
    finally:
        module.tqdm, utils.apply_template = bars, fill
        logger.setLevel(level)


def _result(name: str, found: Mapping[str, Any]) -> TaskResult:
    figures = found["results"][name]
    better = found["higher_is_better"].get(name) or {}
    metrics = []
    for key, value in figures.items():
        metric, _, filter = key.partition(",")
        if not filter or metric.endswith("_stderr") or not _is_number(value):
            continue
        error = figures.get(f"{metric}_stderr,{filter}")
        metrics.append(
            TaskMetric(
                metric, filter, float(value), float(error) if _is_number(error) else None, better.get(metric)
            )
        )
    shots, version = found["n-shot"].get(name), found["versions"].get(name)
    return TaskResult(str(name), str(version), shots, int(figures.get("sample_len") or 0), tuple(metrics))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """A value in JSON's types: items of a task's data may have any type."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, str | int | float) else str(value)
