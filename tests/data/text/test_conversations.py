"""Rows of data as conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from smolctl.data.text.conversations import Conversation, RowError, Shape, read_conversation, shape_of
from smolctl.data.text.files import read_rows
from smolctl.data.text.library_questions import library_questions
from smolctl.errors import InputError

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "So."}
ROWS: dict[Shape, Mapping[str, Any]] = {
    Shape.MESSAGES: {"messages": [QUESTION, ANSWER]},
    Shape.SHAREGPT: {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    Shape.COMPLETION: {"prompt": "Why? ", "completion": " So."},
    Shape.INSTRUCTION: {"instruction": "Why?", "input": "", "output": "So."},
}


def read(row: Mapping[str, Any], shape: str = "auto") -> Conversation:
    return read_conversation(row, shape, "here")


@pytest.mark.parametrize("shape", Shape)
def test_one_conversation_in_every_shape(shape: Shape) -> None:
    assert shape_of(list(ROWS[shape])) is shape
    for known in (shape, "auto"):
        assert read(ROWS[shape], known).messages == (QUESTION, ANSWER)


def test_what_a_row_says_beside_its_turns_is_kept() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "content": None}
    row = {"messages": [QUESTION, call, {"role": "tool", "content": "1"}, ANSWER], "tools": [{"name": "f"}]}
    found = read(row)
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": call["tool_calls"]}
    assert found.tools == ({"name": "f"},)
    spelled = {"name": "f", "arguments": '{"x": null}'}
    for given in ([{"name": "f", "strict": None}], '[{"name": "f"}]'):
        for calls in ([{"function": spelled, "id": None}], json.dumps([{"function": spelled}])):
            found = read(
                {**row, "messages": [QUESTION, {**call, "tool_calls": calls}, ANSWER], "tools": given}
            )
            assert found.tools == ({"name": "f"},)
            (made,) = found.messages[1]["tool_calls"]
            assert made == {"function": {"name": "f", "arguments": {"x": None}}}
    assert "tool_calls" not in read({"messages": [QUESTION, {**ANSWER, "tool_calls": []}]}).messages[1]
    assert read({**ROWS[Shape.SHAREGPT], "system": "Be brief."}).messages[0]["role"] == "system"
    assert read({"prompt": [QUESTION], "completion": [ANSWER]}).completion == 1
    assert read({**ROWS[Shape.INSTRUCTION], "input": "Context."}).messages[0]["content"] == "Why?\n\nContext."
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    assert read({"messages": [{"role": "user", "content": parts}, ANSWER]}).messages[0] == QUESTION


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, "has no conversation: its fields are 'text'"),
        ({}, "its fields are none"),
        ({"messages": "a"}, "'messages' is a text"),
        ({"messages": {"role": "user"}}, "'messages' is an object"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": ["a"]}, "a message is a text"),
        ({"messages": [{"content": "a"}, ANSWER]}, "a message has no role"),
        ({"messages": [{"role": "wizard", "content": "a"}, ANSWER]}, "unknown role 'wizard'"),
        ({"messages": [{"role": 3, "content": "a"}, ANSWER]}, "unknown role 3"),
        ({"messages": [{"role": "user"}, ANSWER]}, "a message of the user has no content"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "'content' is a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
            "something other than text",
        ),
        ({"messages": [QUESTION]}, "the assistant says nothing"),
        ({"messages": [ANSWER]}, "the user says nothing"),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": " "}]},
            "an answer of the assistant is empty",
        ),
        ({"prompt": 3, "completion": "a"}, "'prompt' is a number"),
        ({"instruction": "a", "output": None}, "'output' is null"),
        ({**ROWS[Shape.MESSAGES], "tools": "f"}, "'tools' is not a list"),
        ({**ROWS[Shape.MESSAGES], "tools": '{"name": "f"}'}, "'tools' is not a list"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": [3]}]}, "'tool_calls' is not a list"),
        ({"messages": [QUESTION, {**ANSWER, "a": json.loads("[" * 99 + "]" * 99)}]}, "64 levels deep"),
    ],
)
def test_a_row_that_teaches_nothing_says_why(row: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read(row)


def test_a_shape_that_was_named_must_be_there() -> None:
    with pytest.raises(RowError, match="has no field 'messages'"):
        read(ROWS[Shape.SHAREGPT], Shape.MESSAGES)


def test_rows_of_files_are_read_with_all_fields(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [dict(ROWS[Shape.MESSAGES]), {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}]
    lines, array, table = (tmp_path / name for name in ("a.jsonl", "a.json", "a.parquet"))
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "\n{broken\n3\n")
    array.write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    for path in (lines, array, table):
        found = [row for _, row in read_rows(path, lambda _: None)]
        assert [read(row).messages for row in found[:2] if not isinstance(row, str)] == [
            tuple(row["messages"]) for row in rows
        ]
    places = [(where, row) for where, row in read_rows(lines, lambda _: None) if isinstance(row, str)]
    assert [where.rpartition(", ")[2] for where, _ in places] == ["line 4", "line 5"]
    assert places[0][1].startswith("cannot be read: not JSON (")
    assert "a JSON int" in places[1][1]
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="not read from plain text"):
        list(read_rows(tmp_path / "a.txt", lambda _: None))


def test_the_embedded_questions_have_answers_and_hang_together() -> None:
    rows = [row for _, row in library_questions(lambda _: None)]
    assert len(rows) > 3_000
    assert all(read(row).group for row in rows[::50])
    by_group = {row["group"]: row["messages"][1] for row in rows}
    assert by_group["math.sqrt"]["content"] == "Return the square root of x."
    assert all(row["messages"][1] == by_group[row["group"]] for row in rows)  # one answer, several questions
