"""What a run's folder keeps of its results at tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from smolctl.evaluation.task_record import read_tasks, record_tasks
from smolctl.extras import install_command
from smolctl.ownership import strange_files
from smolctl.publish.facts import read_facts
from smolctl.sources import open_source
from tests.support.processes import Smolctl


def result(task: str, value: float, step: int = 15, **how: Any) -> dict[str, Any]:
    metric = {"name": "acc", "filter": "none", "value": value, "standard_error": 0.01}
    asked = {"version": "1.0", "shots": 0, "items": 40, "limit": None, "chat": False, "lm_eval": "0.4"}
    return {"task": task, "step": step, "metrics": [metric], **asked, **how}


def values(found: list[dict[str, Any]] | Any) -> list[tuple[str, float]]:
    return [(one["task"], one["metrics"][0]["value"]) for one in found]


def test_of_the_same_question_the_newest_result_counts(tmp_path: Path) -> None:
    record_tasks(tmp_path, [result("a", 0.1), result("b", 0.2), result("a", 0.3, shots=5)])
    record_tasks(tmp_path, [result("a", 0.4), result("a", 0.5, step=10), result("b", 0.6, chat=True)])
    assert values(read_tasks(tmp_path, 15)) == [("b", 0.2), ("a", 0.3), ("a", 0.4), ("b", 0.6)]
    assert values(read_tasks(tmp_path, 10)) == [("a", 0.5)]


def test_a_damaged_record_costs_what_was_in_it_and_no_more(tmp_path: Path) -> None:
    record_tasks(tmp_path, [result("a", 0.1), {"task": "of a later version"}])
    assert values(read_tasks(tmp_path, 15)) == [("a", 0.1)]
    text = (tmp_path / "tasks.json").read_text()
    (tmp_path / "tasks.json").write_text(text.replace("40", '"40"'))
    assert read_tasks(tmp_path, 15)[0]["items"] == 40
    (tmp_path / "tasks.json").write_text('{"tasks": [')
    assert read_tasks(tmp_path, 15) == []
    record_tasks(tmp_path, [result("a", 0.2)])
    assert values(read_tasks(tmp_path, 15)) == [("a", 0.2)]


def test_the_card_has_the_results_of_the_published_step(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    run = finished(str(tmp_path / "run"))
    record_tasks(run, [result("a", 0.1), result("a", 0.2, step=10)])
    assert values(read_facts(open_source(str(run)), run).tasks) == [("a", 0.1)]
    assert values(read_facts(open_source(f"{run}@10"), run).tasks) == [("a", 0.2)]
    assert not strange_files(run)  # it belongs to the run


def test_without_lm_eval_the_command_says_how_to_install_it(
    tmp_path: Path, smolctl: Smolctl, monkeypatch: Any
) -> None:
    monkeypatch.setattr("smolctl.evaluation.tasks.LIBRARY", "lm_eval_that_is_not_there")
    called = smolctl("eval", tmp_path, "--tasks", "arc_easy")
    assert (called.code, called.out) == (1, "")
    assert "lm-eval is not installed" in called.err
    assert install_command("eval") in called.err
