"""report.html: a run on one page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from smolctl.config import RunConfig
from smolctl.config.run import PredictionsConfig
from smolctl.runs.environment import write_environment
from smolctl.runs.events import Candidate, Event, Prediction, Step, Validation
from smolctl.runs.folder import RunFolder
from smolctl.runs.layout import ENVIRONMENT
from smolctl.runs.report import HEIGHT, POINTS

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\u202e{{ 7*7 }}&amp;"
SHOWN = HOSTILE.replace("\x1b", "␛").replace("\u202e", "�")


class Page(HTMLParser):
    """The tags, the attributes and the texts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page(folder: Path, *events: Event, text: str = "prompt", name: str = "run") -> Page:
    run = RunFolder(folder / name)
    run.path.mkdir()
    run.write_config(RunConfig(predictions=PredictionsConfig(prompts=(text,))))
    write_environment(run.path / ENVIRONMENT, {"device": text, "devices": [text]})
    for event in events:
        run.record(event)
    run.write_report()
    return Page((run.path / "report.html").read_text(encoding="utf-8"))


def steps(count: int, loss: float | None = 3.0) -> list[Event]:
    return [
        Step(step, loss, 1e-3, 1.0, step * 10, 0.1, 100.0, 1.0, None, None) for step in range(1, count + 1)
    ]


def test_the_page_shows_losses_validations_predictions_settings_and_environment(tmp_path: Path) -> None:
    answer = Prediction(2, "the cat", "sat down", 1.0, (Candidate("sat", 0.5),))
    checks = [Validation(1, 2.5, 0.1, 4.0), Validation(2, 1.25, 0.1, 3.5)]
    found = page(tmp_path, *steps(2), *checks, answer)
    text = "".join(found.texts)
    for told in (
        "1.2500 ± 0.1000",
        "Best, at step 2",
        "3.5000",
        "the cat",
        "sat down",
        "2 of 5,000",
        "0.0 min",
    ):
        assert told in text
    assert "learning_rate: 0.0003" in text
    assert '"device": "prompt"' in text
    assert found.tags.count("circle") == 2
    assert found.tags.count("polyline") == 3


def test_the_best_score_is_one_on_the_text_that_was_scored_last(tmp_path: Path) -> None:
    other = Validation(1, 0.5, 0.1, 2.0, tokens=100)
    checks = [other, *(Validation(step, 2.0 + step, 0.1, 4.0, tokens=200) for step in (2, 3))]
    found = page(tmp_path, *steps(3), *checks)
    best = RunFolder(tmp_path / "run").best_validation()
    assert best is not None
    assert f"Best, at step {best['step']}" in "".join(found.texts)
    assert best["step"] == 2


def test_the_page_is_one_file_without_a_script(tmp_path: Path) -> None:
    found = page(tmp_path, *steps(3))
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not {"src", "href", "style"} & found.attributes
    assert found.open == []
    assert "default-src 'none'" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_what_a_model_or_a_user_wrote_is_text(tmp_path: Path) -> None:
    plain = page(tmp_path, *steps(1), Prediction(1, "a", "b", None, ()))
    answer = Prediction(1, HOSTILE, HOSTILE, None, ())
    hostile = page(tmp_path, *steps(1), answer, text=HOSTILE.replace("\x1b", ""), name="<b>run")
    assert hostile.tags == plain.tags
    assert hostile.attributes == plain.attributes
    assert [text for text in hostile.texts if text == SHOWN] == [SHOWN] * 2
    assert "<b>run" in hostile.texts


@pytest.mark.parametrize("loss", [3.0, None])
@pytest.mark.parametrize("count", [0, 1, 5, POINTS + 1])
def test_a_report_can_be_written_of_any_run(count: int, loss: float | None, tmp_path: Path) -> None:
    found = page(tmp_path, *steps(count, loss))
    html = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert len(html) < 60_000
    assert "nan" not in re.sub("(?s)<style>.*</style>", "", html)
    assert ("svg" in found.tags) == bool(count and loss)


def test_the_high_losses_of_the_first_steps_leave_the_picture_at_its_top(tmp_path: Path) -> None:
    falling = [
        Step(
            step, 1000.0 if step < 3 else 4.0 - step / 200, 1e-3, 1.0, step * 10, 0.1, 100.0, 1.0, None, None
        )
        for step in range(1, 201)
    ]
    page(tmp_path, *falling)
    html = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    heights = [float(point.split(",")[1]) for point in re.findall(r'points="([^"]*)"', html)[0].split()]
    assert heights[0] < 0  # a line along the top would be read as a loss that does not fall
    assert all(0 <= height <= HEIGHT for height in heights[10:])
    assert re.findall(r">(50|100|150|200)</text>", html) == ["50", "100", "150", "200"]
