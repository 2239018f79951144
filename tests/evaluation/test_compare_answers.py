"""Models on the same conversations: the answers count, however each model's template writes them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolctl.data.tokenizer.chatml import CHATML
from smolctl.data.tokens.marks import CONTEXT, IDS
from smolctl.errors import InputError
from smolctl.evaluation.compare import CompareOptions, Comparison, compare
from tests.support.tiny_chats import prepare_chat, write_rows
from tests.support.tiny_models import write_folder
from tests.support.tiny_runs import run

REFUSES_RAIN = (
    "{% for m in messages %}{% if 'rain' in m.content %}{{ raise_exception('no rain') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ANSWERS = [
    "the mat is flat",
    "Größe and 界面",
    "birds fly over trees",
    "a cat sat in the rain",
    "no",
    "12 dogs",
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    pairs = [(f"what of {number}? " * (1 + 9 * (number == 2)), text) for number, text in enumerate(ANSWERS)]
    return write_rows(tmp_path / "rows.jsonl", pairs=pairs)


def on(rows: Path, *models: Path, **options: int) -> Comparison:
    return compare(list(map(str, models)), CompareOptions((str(rows),), **options))


def silent(folder: Path) -> Path:
    """The model with a head of zeros, which gives every token the same probability."""
    file = folder / "model.safetensors"
    state = load_file(file)
    state["model.embed_tokens.weight"] = torch.zeros_like(state["model.embed_tokens.weight"])
    save_file(state, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("context", [12, 96])
def test_the_tokens_of_the_answers_are_scored_and_nothing_else(
    rows: Path, tmp_path: Path, context: int
) -> None:
    model = silent(write_folder(tmp_path / "a", template=CHATML))
    found = on(rows, model, model, context=context)
    assert found.text.is_chat
    assert found.text.bytes == sum(len(answer.encode()) for answer in ANSWERS)
    (measure, _) = found.measures
    assert measure.bits_per_byte.mean == pytest.approx(measure.tokens * math.log2(320) / found.text.bytes)
    plain = compare([str(model)] * 2, CompareOptions((str(write_answers(tmp_path)),))).measures[0]
    assert measure.tokens == plain.tokens + len(ANSWERS)  # and the end of every turn


def write_answers(folder: Path) -> Path:
    (folder / "answers").mkdir()
    for number, answer in enumerate(ANSWERS):
        (folder / "answers" / f"{number}.txt").write_text(answer)
    return folder / "answers"


def test_each_model_reads_its_own_template_and_what_one_refuses_none_reads(
    rows: Path, tmp_path: Path
) -> None:
    one = write_folder(tmp_path / "one", template=CHATML)
    other = write_folder(tmp_path / "other", template=REFUSES_RAIN)
    bare = write_folder(tmp_path / "bare", template=None)
    notes: list[str] = []
    found = compare(list(map(str, (one, other, bare))), CompareOptions((str(rows),)), notes.append)
    assert len(found.text.documents) == len(ANSWERS) - 1
    assert found.text.bytes == sum(len(answer.encode()) for answer in ANSWERS if "rain" not in answer)
    first, second, third = (measure.bits_per_byte.mean for measure in found.measures)
    assert first == third != second  # without a template it reads ChatML, as in training
    assert any(f"Left out: 1 of {len(ANSWERS)} conversations" in note for note in notes)
    assert any("ChatML" in note and "bare" in note for note in notes)


def test_conversations_that_one_model_cannot_read_at_all_are_no_ground_for_a_verdict(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pairs=[("rain?", "rain.")] * 3)
    models = [
        write_folder(tmp_path / "a", template=CHATML),
        write_folder(tmp_path / "b", template=REFUSES_RAIN),
    ]
    with pytest.raises(InputError, match="no conversation that all models can read"):
        on(rows, *models)


def test_one_conversation_is_too_little_for_an_interval(tmp_path: Path) -> None:
    model = write_folder(tmp_path / "a", template=CHATML)
    with pytest.raises(InputError, match="one conversation, which is too little for an interval"):
        on(write_rows(tmp_path / "rows.jsonl", pairs=[("rain?", "rain.")]), model, model)


def test_a_chat_run_is_compared_with_any_model_on_the_answers_that_it_has_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = prepare_chat(write_rows(tmp_path / "rows.jsonl"))
    folder = run(prepared, "chat")
    found = compare([str(folder), str(write_folder(tmp_path / "base", template=None))])
    assert prepared.corpus.validation is not None
    stream = prepared.corpus.validation.parts[0].tokens
    words = stream.read(0, len(stream))
    held_out = prepared.tokenizer.decode((words & IDS)[(words & CONTEXT) == 0].tolist())
    said = [
        document.messages[1]["content"] for document in found.text.documents if not isinstance(document, str)
    ]
    assert said
    assert sorted(held_out.split(".")) == sorted("".join(said).split("."))
    assert found.text.name.startswith("held-out part of")
