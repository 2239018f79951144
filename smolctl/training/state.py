"""Checks that a checkpoint contains everything that a run needs to continue, before anything is changed.

A checksum shows that the bytes are those that were written, but not that they are the complete state of a
run. PyTorch and Lightning silently accept much that does not fit: a missing optimizer state, moments of
another shape, a missing step count. So the state is compared with that of a run with the recorded config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import ConfigDict, Field, with_config
from torch import Tensor
from typing_extensions import TypedDict

from smolctl.config import RunConfig
from smolctl.data.order import ORDER
from smolctl.errors import InputError
from smolctl.model.network import Transformer
from smolctl.outside import checked
from smolctl.runs.checkpoint_file import ANOTHER, holds_weights, recorded_config
from smolctl.runs.folder import RunFolder
from smolctl.runs.layout import step_in_name
from smolctl.runs.records import StepNumber
from smolctl.training.optim.optimizers import make_optimizer
from smolctl.training.rng import keeping_rng, restore_rng

# Required for a run to continue: parts of Lightning's data in a checkpoint, and of smolctl's.
NEEDED = (
    *("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step"),
    *("pytorch-lightning_version", "smolctl"),
)
NEEDED_OF_SMOLCTL = ("samples", "data", "tokenizer", "rng")
# Lightning's counters, which start at 0 again if they are missing.
COUNTS = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
UPDATES = dict.fromkeys(("ready", "completed"), 0)
STEPS = "epoch_loop.manual_optimization.optim_step_progress"
LOOPS: Mapping[str, Any] = {
    "epoch_loop.state_dict": {"_batches_that_stepped": 0},
    "epoch_loop.batch_progress": {"total": COUNTS, "current": COUNTS, "is_last_batch": False},
    "epoch_progress": {"total": COUNTS, "current": COUNTS},
    STEPS: {"total": UPDATES, "current": UPDATES},
}
SET_AGAIN = {"params", "lr", "weight_decay", "betas", "eps", "momentum"}  # of a group: set from the config
OWN_GROUP_KEYS = {"muon", "lr_multiplier"}  # PyTorch replaces missing values of its own only

strict = with_config(ConfigDict(strict=True))  # does not accept "6" as a step


@strict
class _Decided(TypedDict):
    device: str
    asked: list[str] | tuple[str, ...]


@strict
class _Progress(TypedDict):
    step: StepNumber
    best_step: StepNumber
    bits_per_byte: float
    since: StepNumber
    tokens: NotRequired[StepNumber]


@strict
class _Scaler(TypedDict):
    scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    _growth_tracker: int


@strict
class _SmolctlData(TypedDict):
    samples: StepNumber
    data: str
    tokenizer: str
    rng: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tokens: NotRequired[list[str]]
    decisions: NotRequired[_Decided | None]
    progress: NotRequired[_Progress]
    scaler: NotRequired[_Scaler]
    skipped: NotRequired[list[StepNumber] | tuple[StepNumber, StepNumber]]


@strict
class _Loops(TypedDict):
    fit_loop: dict[str, dict[str, Any]]


@strict
class _Group(TypedDict):
    params: list[int]


@strict
class _OptimizerState(TypedDict):
    state: dict[int, dict[str, Any]]
    param_groups: list[_Group]


_Written = TypedDict(
    "_Written", {"pytorch-lightning_version": Annotated[str, Field(pattern=r"^\d+(\.\d+)+([a-z.+]|$)")]}
)


@strict
class _Resumable(_Written):
    """The types in a checkpoint; values that depend on the config are compared by `_misfits`."""

    global_step: StepNumber
    state_dict: dict[str, Any]
    optimizer_states: Annotated[list[_OptimizerState], Field(min_length=1, max_length=1)]
    lr_schedulers: list[Any]
    loops: _Loops
    callbacks: NotRequired[dict[str, Any]]
    smolctl: _SmolctlData


def run_of(content: Mapping[str, Any], path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The config of a checkpoint, and smolctl's data of the run in it.

    Raises:
        InputError: no run can continue from it; names what is missing or does not fit.
    """
    config, state = recorded_config(content, path), content.get("smolctl")
    data = state if isinstance(state, Mapping) else {}
    missing = [key for key in NEEDED if key not in content] + [
        key for key in NEEDED_OF_SMOLCTL if key not in data
    ]
    origin = config.init_from if config and content.get("global_step") == 0 else None
    if not missing and not holds_weights(content) and not (origin and origin.sha256):
        missing = ["weights"]
    if config is None or missing:
        raise InputError(
            f"{path}: no run can be resumed from it: it has no {missing[0] if missing else 'config'}",
            "Start a new run from its weights instead: smolctl train --init-from FILE."
            if holds_weights(content)
            else _remedy(path),
        )
    if data.get("order", 1) != ORDER:  # known before anything is tokenized
        raise InputError(
            f"{path}: the version of smolctl that trained this run splits the text into different sequences",
            "Resume it with that version, or start a new run from it: smolctl train --init-from RUN.",
        )
    try:
        checked(_Resumable, content, f"{path}: damaged")
        if misfit := next(_misfits(content, config, path), None):
            raise InputError(f"{path}: damaged: {misfit}")
    except InputError as error:
        raise InputError(error.message, _remedy(path)) from None  # finding an intact one may take a while
    return config, dict(data)


def _remedy(path: Path) -> str:
    run = RunFolder.around(path)
    other = run.newest_sound(but=path) if run else None
    if run is None or other is None:
        return ANOTHER
    return f"Resume from another checkpoint: smolctl resume {run.path}@{other.step}"


def _misfits(content: Mapping[str, Any], config: RunConfig, path: Path) -> Iterator[str]:
    """Differences between a checkpoint's state and that of a run with its config, as the end of a
    sentence.
    """
    with torch.device("meta"):  # names, shapes and types without data
        network = Transformer(config.model)
    if config.train.precision == "bf16-true":
        network = network.bfloat16()
    if holds_weights(content):
        weights = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        yield from _differences(weights, content["state_dict"], "state_dict", is_whole=True)
    step, data, optimizer = content["global_step"], content["smolctl"], content["optimizer_states"][0]
    yield from _optimizer_misfits(optimizer, network, config, is_new=step <= data.get("skipped", [0])[0])
    loops = content["loops"]["fit_loop"]
    yield from _differences(LOOPS, loops, "loops")
    if (counted := loops[STEPS]["total"]["completed"]) != step:
        yield f"global_step is {step}, but the loops have counted {counted}"
    named = step_in_name(path)
    if named not in (None, step) and RunFolder.around(path):
        yield f"global_step is {step}, but the file is named after step {named}"
    if config.train.precision == "16-mixed" and step and not {"scaler", "skipped"} <= data.keys():
        yield "smolctl has no scaler of the gradients"
    for generators in data["rng"]:
        try:
            with keeping_rng():
                restore_rng(generators)
        except Exception as error:  # each generator raises a different exception
            yield f"smolctl.rng cannot be restored ({type(error).__name__}: {error})"


def _optimizer_misfits(
    found: Mapping[str, Any], network: Transformer, config: RunConfig, is_new: bool
) -> Iterator[str]:
    """`_misfits` of the optimizer; one that `is_new` has made no update, and has no moments yet."""
    wanted = make_optimizer(network, config.optimizer).param_groups
    groups, place = found["param_groups"], "optimizer_states"
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in wanted]:
        yield f"{place} has other groups of parameters than the config's {config.optimizer.name}"
        return
    moments = {}
    for group, saved in zip(wanted, groups, strict=True):
        shared = (group.keys() & saved.keys()) | (OWN_GROUP_KEYS & (group.keys() | saved.keys()))
        for key in sorted(shared - SET_AGAIN):
            if saved.get(key) != group.get(key):
                yield f"{place} has {key} {saved.get(key)!r}, but the config needs {group.get(key)!r}"
        for number, weight in zip(saved["params"], group["params"], strict=True):
            moments[number] = (
                {"momentum_buffer": weight}
                if group.get("muon")
                else {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}
            )
    if len(moments) != sum(len(group["params"]) for group in wanted):
        yield f"{place} names a parameter twice"
    if is_new:
        moments = {number: one for number, one in moments.items() if number in found["state"]}
    yield from _differences(moments, found["state"], f"{place} state", is_whole=True)


def _differences(wanted: Any, found: Any, place: str, is_whole: bool = False) -> Iterator[str]:
    """Nested values that are missing or have another type or shape, as the end of a sentence.

    Args:
        wanted: values with the expected types and shapes.
        found: the actual values.
        place: their name in the sentence.
        is_whole: whether additional values are differences too.
    """
    if isinstance(wanted, Mapping):
        if not isinstance(found, Mapping):
            yield f"{place} is not a mapping"
            return
        for key in wanted:
            if key not in found:
                yield f"{place} has no {key}"
            else:
                yield from _differences(wanted[key], found[key], f"{place} {key}", is_whole)
        for key in found if is_whole else ():
            if key not in wanted:
                yield f"{place} has {key}, which the config's model does not have"
    elif isinstance(wanted, Tensor):
        needed, given = _kind(wanted), _kind(found) if isinstance(found, Tensor) else type(found).__name__
        if given != needed:
            yield f"{place} is {given}, but the config needs {needed}"
    elif type(found) is not type(wanted):
        yield f"{place} is {type(found).__name__}, not {type(wanted).__name__}"


def _kind(tensor: Tensor) -> str:
    """A tensor's type and shape, and its layout if a network never has that."""
    layout = "" if tensor.layout is torch.strided else f"{tensor.layout} ".removeprefix("torch.")
    return f"{layout}{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
