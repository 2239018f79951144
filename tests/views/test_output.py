"""Where words go, whatever the encoding of the stream."""

from __future__ import annotations

import io
import json
import sys

import pytest

from smolctl.views.output import Output, tolerate_encodings

TEXT = "a → b, \u00e9 ± \U0001f600 “q\\”"


class Stream(io.TextIOWrapper):
    def __init__(self, encoding: str, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding, write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def written(self) -> str:
        content = self.buffer
        assert isinstance(content, io.BytesIO)
        return content.getvalue().decode(self.encoding)


@pytest.fixture(params=["ascii", "latin-1", "utf-8"])
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_terminal_shows_a_question_mark_for_what_it_lacks(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(encoding, terminal=True)
    monkeypatch.setattr(sys, "stdout", stream)
    tolerate_encodings()
    Output().line(TEXT)
    assert stream.written == TEXT.encode(encoding, "replace").decode(encoding) + "\n"


def test_json_is_json_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(encoding, terminal=False)
    monkeypatch.setattr(sys, "stdout", stream)
    tolerate_encodings()
    out = Output(json=True)
    out.event({"text": TEXT})
    out.document({"text": TEXT})
    first, document = stream.written.split("\n", 1)
    assert json.loads(first) == json.loads(document) == {"text": TEXT}
