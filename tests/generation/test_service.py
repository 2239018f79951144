"""The thread behind `serve` and the Gradio Space answers everybody, whatever one listener does."""

from __future__ import annotations

from queue import SimpleQueue

import pytest

from smolctl.errors import SmolError
from smolctl.generation.complete import CompletionSettings
from smolctl.generation.service import Piece, Service, ServicePrompt
from tests.support.tiny_models import tiny_model, tiny_tokenizer

TOKENS = 5


def test_a_listener_that_fails_ends_its_own_answers_only(caplog: pytest.LogCaptureFixture) -> None:
    ids = tiny_tokenizer().encode("the cat")
    prompt = ServicePrompt(ids, CompletionSettings(max_tokens=TOKENS))
    service = Service(tiny_model(), slots=2, capacity=32, waiting=0)

    def gone(_piece: Piece | SmolError) -> None:
        raise RuntimeError("Event loop is closed")

    try:
        for _ in range(3):  # each needs the slot of the one before
            pieces: SimpleQueue[Piece | SmolError] = SimpleQueue()
            service.start([prompt], gone)
            service.start([prompt], pieces.put)
            answer: list[Piece] = []
            while not answer or not answer[-1].finish_reason:
                piece = pieces.get(timeout=20)
                assert isinstance(piece, Piece), piece
                answer.append(piece)
            assert len(answer) == TOKENS
    finally:
        service.close()
    assert "Event loop is closed" in caplog.text
