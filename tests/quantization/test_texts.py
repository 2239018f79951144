"""The text that variants are measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolctl.config import RunConfig
from smolctl.config.data import DataConfig
from smolctl.data.tokenizer.chatml import with_chatml
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError
from smolctl.quantization.texts import choose_windows
from smolctl.sources.base import ModelSource, SourceKind
from tests.support.tiny_models import tiny_network
from tests.support.tokenizers import SAMPLE, tokenizer


@pytest.mark.parametrize(("kind", "begins"), [("llama", True), ("smollm", False)])
def test_every_window_begins_as_a_text_does(
    kind: str, begins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("\n".join(SAMPLE) * 4)
    given = Tokenizer(tokenizer(kind), bos_token_id=1, eos_token_id=2)
    config = tiny_network(vocab_size=given.vocab_size, context=32).config
    source = ModelSource(SourceKind.FOLDER, "model", config)
    windows = choose_windows(source, config, given, [str(path)], 8, calibrate=True)
    assert len(windows.measured) > 4
    for window in (*windows.measured, *windows.calibration):
        assert window.shape == (33,)
        assert (window[0] == 1) == begins


def test_of_the_conversations_that_a_run_held_out_only_the_answers_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"question {n} " * (n % 3 + 1), "completion": f"answer {n}"} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    given = with_chatml(Tokenizer(tokenizer("smollm")))
    config = tiny_network(vocab_size=given.vocab_size, context=64).config
    data = DataConfig(source=(str(path),), format="chat", validation_fraction=0.5, sequence_length=64)
    source = ModelSource(SourceKind.RUN, "run", config, run=RunConfig(model=config, data=data))
    windows = choose_windows(source, config, given, [], 8, calibrate=False)
    assert len(windows.measured) > 4
    assert windows.name.startswith("answers in the held-out part of ")
    shown = set()
    for window, counted, documents in zip(windows.measured, windows.counted, windows.documents, strict=True):
        assert window.shape == (len(counted) + 1,) == (len(documents) + 1,)
        assert given.decode(window.tolist()).count("question") <= 3  # a single conversation
        shown.add(given.decode(window[1:][counted].tolist()).strip())
    assert shown <= {row["completion"] for row in rows}
    assert windows.tokens == sum(int(counted.sum()) for counted in windows.counted)


def test_a_text_shorter_than_a_sequence_leads_to_an_option_of_quantize(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("short")
    given = Tokenizer(tokenizer("smollm"))
    config = tiny_network(vocab_size=given.vocab_size, context=32).config
    source = ModelSource(SourceKind.FOLDER, "model", config)
    with pytest.raises(InputError, match="tokens; a sequence takes") as caught:
        choose_windows(source, config, given, [str(path)], 8, calibrate=False)
    assert caught.value.hint == "Name another text with --data: sequences of 32 tokens are measured."
