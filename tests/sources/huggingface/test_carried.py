"""Settings of a model that nothing can rebuild: every export carries them unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.processes import Smolctl
from tests.support.tiny_models import write_folder

SETTINGS = {
    "generation_config.json": '{"eos_token_id": [2, 1], "temperature": 0.6, "do_sample": true}',
    "tokenizer_config.json": '{"eos_token": "<|im_end|>",  "padding_side": "left"}\r\n',
    "special_tokens_map.json": '{"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}',
    "added_tokens.json": '{"<|im_start|>": 1}',
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}\r\n{% endfor %}",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in SETTINGS}


@pytest.mark.parametrize(
    "export",
    [
        "quantize --no-measure --to int8",
        "quantize --no-measure --to bf16",
        "quantize --no-measure --to int8-dynamic",
        "push --local-dir",
    ],
)
@pytest.mark.parametrize("left_out", [(), ("tokenizer_config.json", "chat_template.jinja"), tuple(SETTINGS)])
def test_every_export_carries_settings_unchanged(
    export: str, left_out: tuple[str, ...], tmp_path: Path, smolctl: Smolctl
) -> None:
    model, once, twice = (
        write_folder(tmp_path / "model", template=None, intermediate_size=64),
        "once",
        "twice",
    )
    settings = {name: text.encode() for name, text in SETTINGS.items() if name not in left_out}
    for name, text in settings.items():
        (model / name).write_bytes(text)
    verb, *options = export.split()
    where = [] if "--local-dir" in options else ["--out"]
    called = smolctl(verb, model, *options, *where, tmp_path / once)
    assert called.code == 0, called.err
    assert {name: text for name, text in contents(tmp_path / once).items() if name in settings} == settings
    again = smolctl("quantize", tmp_path / once, "--no-measure", "--to", "int8", "--out", tmp_path / twice)
    assert again.code == 0, again.err
    assert contents(tmp_path / twice) == contents(tmp_path / once)


def test_a_dynamic_checkpoint_carries_settings_and_no_other_files(tmp_path: Path, smolctl: Smolctl) -> None:
    model = write_folder(tmp_path / "model", template=None)
    for name, text in SETTINGS.items():
        (model / name).write_bytes(text.encode())
    options = ("--no-measure", "--to", "int8-dynamic", "--out", tmp_path / "out")
    assert smolctl("quantize", model, *options).code == 0
    (checkpoint,) = (tmp_path / "out").glob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content["tokenizer"]["carried"]["../outside.json"] = "{}"
    torch.save(content, tmp_path / "alone.ckpt")
    options = ("--no-measure", "--to", "int8", "--out", tmp_path / "again")
    assert smolctl("quantize", tmp_path / "alone.ckpt", *options).code == 0
    assert contents(tmp_path / "again") == {name: text.encode() for name, text in SETTINGS.items()}
    assert not (tmp_path / "outside.json").exists()
