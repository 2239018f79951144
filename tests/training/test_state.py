"""A checkpoint of sound bytes whose state is not that of its run is refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smolctl.durable import file_digest
from smolctl.errors import InputError
from smolctl.runs.checkpoint_file import write_checksum
from smolctl.runs.folder import RunFolder
from smolctl.training.state import STEPS, run_of
from tests.support.tiny_runs import go_on, state

NORM = "network.model.norm.weight"
OPTIMIZER, MOMENTS, GROUP = ("optimizer_states", 0), ("optimizer_states", 0, "state"), ("param_groups", 0)
TOTAL = ("loops", "fit_loop", STEPS, "total")
# The value at a place in a checkpoint, what takes its place (None: nothing), and what the refusal names.
DAMAGES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("global_step",), "15", "global_step"),
    (("global_step",), 14, "global_step is 14"),
    (("pytorch-lightning_version",), "new", "Lightning|pattern"),
    (("lr_schedulers",), {}, "lr_schedulers"),
    (("callbacks",), [1], "callbacks"),
    (("state_dict",), {}, "no weights"),
    (("state_dict", NORM), None, f"no {NORM}"),
    (("state_dict", "network.more"), torch.zeros(1), "network.more"),
    (("state_dict", NORM), torch.zeros(3), rf"{NORM} is float32 \[3\]"),
    (("state_dict", NORM), torch.zeros(32, dtype=torch.int32), f"{NORM} is int32"),
    (("state_dict", NORM), 1.0, f"{NORM} is float"),
    (("optimizer_states",), [], "optimizer_states"),
    (MOMENTS, {}, "optimizer_states state has no 0"),
    ((*MOMENTS, 3), None, "state has no 3"),
    ((*MOMENTS, 99), {}, "state has 99"),
    ((*MOMENTS, 3, "exp_avg_sq"), None, "state 3 has no exp_avg_sq"),
    ((*MOMENTS, 3, "exp_avg"), torch.zeros(7, 7), "state 3 exp_avg"),
    ((*MOMENTS, 3, "step"), torch.zeros(2), "state 3 step"),
    ((*MOMENTS, 3, "exp_avg"), torch.zeros(16, 32).to_sparse(), "sparse"),
    ((*OPTIMIZER, "param_groups"), [], "groups of parameters"),
    ((*OPTIMIZER, *GROUP, "params"), [0], "groups of parameters"),
    ((*OPTIMIZER, *GROUP, "params"), [0] * 16, "a parameter twice"),
    ((*OPTIMIZER, *GROUP, "amsgrad"), True, "amsgrad True"),
    ((*OPTIMIZER, *GROUP, "lr_multiplier"), 3.0, "lr_multiplier 3.0"),
    (("loops",), {}, "loops.fit_loop"),
    (("loops", "fit_loop", STEPS), None, f"loops has no {STEPS}"),
    ((*TOTAL, "completed"), 3, "loops have counted 3"),
    ((*TOTAL, "completed"), "15", "completed is str"),
    (("smolctl", "samples"), -1, "samples"),
    (("smolctl", "progress"), {}, "progress"),
    (("smolctl", "rng"), [], "rng"),
    (("smolctl", "rng", 0, "numpy"), None, "rng cannot be restored.*numpy"),
    (("smolctl", "rng", 0, "torch"), torch.zeros(3), "rng cannot be restored"),
]


def damaged(run: Path, place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The last checkpoint of a run with another value at a place."""
    content = state(run, 15)
    holder: Any = content
    for key in place[:-1]:
        holder = holder[key]
    if value is None:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return content


@pytest.mark.parametrize(("place", "value", "named"), DAMAGES)
def test_a_state_that_does_not_fit_its_config_is_named(
    whole: Path, place: tuple[Any, ...], value: Any, named: str
) -> None:
    path = RunFolder(whole).checkpoint_path(15)
    with pytest.raises(InputError, match=named) as caught:
        run_of(damaged(whole, place, value), path)
    assert caught.value.hint == f"Resume from another checkpoint: smolctl resume {whole}@10"


@pytest.mark.parametrize("step", [0, 5, 15])
def test_the_state_that_a_run_has_written_fits(whole: Path, step: int) -> None:
    config, ours = run_of(state(whole, step), RunFolder(whole).checkpoint_path(step))
    assert (config.train.steps, ours["samples"]) == (15, 4 * step)


def test_a_checkpoint_without_its_optimizer_ends_before_the_run_is_touched(
    finished: Callable[[str], Path],
) -> None:
    folder = finished("run")
    path = RunFolder(folder).checkpoint_path(15)
    torch.save(damaged(folder, ("optimizer_states",), []), path)
    write_checksum(path, file_digest(path))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match="optimizer_states"):
        go_on(folder, extra=1)
    assert {file: file.read_bytes() for file in before} == before


def test_a_checkpoint_under_the_name_of_another_step_does_not_replace_it(
    finished: Callable[[str], Path],
) -> None:
    folder = finished("run")
    run = RunFolder(folder)
    run.checkpoint_path(10).replace(run.checkpoint_path(20))
    write_checksum(run.checkpoint_path(20), file_digest(run.checkpoint_path(20)))
    with pytest.raises(InputError, match="global_step is 10, but the file is named after step 20"):
        go_on(folder, extra=1, force=True)
    assert run.checkpoint_path(20).exists()
