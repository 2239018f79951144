"""The text that variants are measured on."""

from __future__ import annotations

from pathlib import Path

import pytest

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
