"""The best checkpoint by validation, and runs that end when they do not improve any more."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smolctl.config.load import merge
from smolctl.errors import InputError
from smolctl.publish.build import open_model
from smolctl.runs.events import End, Event, Note, Step, Validation
from smolctl.runs.folder import RunFolder
from smolctl.runs.reference import split_step
from smolctl.sources import open_source
from smolctl.training.patience import Progress
from smolctl.training.prepare import Prepared
from smolctl.training.train import train
from tests.support.processes import Smolctl
from tests.support.tiny_runs import assert_same_run, go_on, prepare_tiny, run, state

# On text that is nothing like the corpus, three steps help, and after them each score is worse.
WORSE_AFTER_3: dict[str, Any] = {
    "data": {"validation": "other.txt"},
    "optimizer": {"learning_rate": 0.01},
    "train": {"patience": 3},
    "checkpoint": {"every": 4, "keep_last": 1},
    "predictions": {"every": 0},
    "validation": {"every": 1},
}
Make = Callable[..., Prepared]


@pytest.fixture
def make(workshop: Path) -> Make:
    Path("other.txt").write_text("zebras hum 1234567890; quick fox jumps! " * 60)
    return lambda **changes: prepare_tiny(workshop / "corpus", **merge(WORSE_AFTER_3, changes))


def scores(folder: Path) -> Iterator[tuple[int, float]]:
    for record in RunFolder(folder).metrics():
        if record["event"] == "validation":
            yield record["step"], record["bits_per_byte"]


def test_scores_of_another_text_are_not_compared(make: Make, tmp_path: Path) -> None:
    before = Progress(step=5, best_step=5, bits_per_byte=1.0, since=0, tokens=128)
    assert before.on_text(128).after(6, 2.0).since == 1
    assert before.on_text(32).after(6, 2.0) == Progress(6, 6, 2.0, 0, 32)
    records = RunFolder(tmp_path)
    for step, score, tokens, best in ((1, 1.5, None, 1), (2, 1.0, 128, 2), (3, 1.1, 128, 2), (4, 2.0, 32, 4)):
        records.record(Validation(step, score, 0.1, 3.0, None, tokens))
        fewest = records.best_validation()
        assert fewest
        assert fewest["step"] == best

    folder = run(make(train={"steps": 4}), "run")
    go_on(folder, extra=2, settings={"validation": {"sequences": 1}})
    assert state(folder, 6)["smolctl"]["progress"]["tokens"] == 32
    scored = [record for record in RunFolder(folder).metrics() if record["event"] == "validation"]
    found = [(record["step"], record["tokens"]) for record in scored]
    assert found[3:] == [(4, 128), (4, 32), (5, 32), (6, 32)]


def test_a_run_out_of_patience_stops_keeps_its_best_and_goes_on_with_more(
    make: Make, smolctl: Smolctl
) -> None:
    events: list[Event] = []
    folder = run(make(), "whole", events)
    end, best = events[-1], f"{folder}@best"
    assert isinstance(end, End)
    assert (end.reason, end.step, end.best_step, end.best_is_kept) == ("patience", 6, 3, True)
    assert any(
        "train.patience: 3 validations in a row" in note.text for note in events if isinstance(note, Note)
    )
    assert [file.step for file in RunFolder(folder).checkpoints()] == [3, 6]
    assert (folder / "checkpoints/final.ckpt").samefile(RunFolder(folder).checkpoint_path(6))

    assert split_step(best) == (folder, 3)
    assert open_source(best).step == 3
    assert (open_model(str(folder)).better_step, open_model(best).better_step) == (
        3,
        None,
    )  # what `push` says
    assert smolctl("resume", best, "--out", "branch", "--until", "5").code == 0
    assert [file.step for file in RunFolder(Path("branch")).checkpoints()] == [3, 5]

    assert [event.step for event in go_on(folder) if isinstance(event, End)] == [6]
    more = go_on(folder, settings={"train": {"patience": 20}})
    assert [event.step for event in more if isinstance(event, End)] == [15]


def test_a_run_that_a_signal_interrupts_stops_where_a_continuous_run_stops(make: Make) -> None:
    whole = run(make(), "whole")
    for step in (3, 4):  # 4 is saved anyway, 3 for being the best: the signal comes before that is known

        def interrupt(event: Event, step: int = step) -> None:
            if isinstance(event, Step) and event.step == step:
                signal.raise_signal(signal.SIGTERM)

        parts = Path(f"stopped-{step}")
        assert train(make(), "tiny", parts, force=False, emit=interrupt).step == step
        go_on(parts)
        assert_same_run(whole, parts, 6)
        assert RunFolder(parts).best_step() == 3
        assert [*scores(parts)] == [*scores(whole)]


def test_without_a_validated_checkpoint_none_is_the_best(make: Make) -> None:
    folder = run(make(validation={"every": 0}, train={"patience": 0, "steps": 1}), "blind")
    with pytest.raises(InputError, match="there is no best one"):
        split_step(f"{folder}@best")
