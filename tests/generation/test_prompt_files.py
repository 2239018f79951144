"""`smolctl sample --jsonl`: a file of prompts, its faults, and an output that is gone on with."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from smolctl.durable import writing_alone
from tests.support.disks import small_disk
from tests.support.interruption import InterruptedAt
from tests.support.processes import Smolctl, start
from tests.support.tiny_models import SHORT

LIMIT_S = 120  # what is not written by then will never come


def answers_of(smolctl: Smolctl, path: Path, model: Path, *options: str) -> list[dict[str, Any]]:
    done = smolctl("sample", model, "--jsonl", path, *SHORT, *options)
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def texts(answer: dict[str, Any]) -> list[str]:
    return [completion["text"] for completion in answer["completions"]]


def test_a_file_of_prompts_is_answered_in_its_order(smolctl: Smolctl, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    chat = {"messages": [{"role": "user", "content": "the dog"}], "id": 7}
    prompts = [{"prompt": "the cat", "kept": [1]}, "a longer prompt about the dog", "on", chat]
    path.write_text("\n\n".join(map(json.dumps, prompts)))
    answers = answers_of(smolctl, path, model, "-n", "2", "--batch-size", "2", "--temperature", "1")
    assert [answer.get("prompt") for answer in answers] == ["the cat", *prompts[1:3], None]
    assert (answers[0]["kept"], answers[3]["id"]) == ([1], 7)
    assert all(len(answer["completions"]) == 2 for answer in answers)
    others = answers_of(smolctl, path, model, "-n", "2", "--temperature", "1")  # in another batch
    assert list(map(texts, answers)) == list(map(texts, others))
    greedy = answers_of(smolctl, path, model)
    alone = smolctl("sample", model, "--prompt", "on", *SHORT, "--json").json
    asked = smolctl("sample", model, "--chat", "--prompt", "the dog", *SHORT, "--json").json
    assert [texts(greedy[2]), texts(greedy[3])] == [texts(alone), texts(asked)]


def test_prompts_without_end_are_refused(
    smolctl: Smolctl, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolctl.generation.prompts.MOST_PROMPTS", 5_000)
    for options in (["--jsonl", "/dev/zero"], ["--jsonl", "-"], []):
        monkeypatch.setattr("sys.stdin", io.StringIO("x" * 6_000))
        called = smolctl("sample", model, *options)
        assert called.code == 3
        assert "has more than 5,000 characters" in called.err


def test_a_line_may_be_a_request_as_clients_of_openai_send_it(
    smolctl: Smolctl, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}]
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    asked = [{"role": "system", "content": "a"}, {"role": "user", "content": "the dog"}]
    plain: dict[str, Any] = {"messages": asked}
    rows: list[dict[str, Any]] = [
        plain,
        {"messages": [{"role": "developer", "content": "a"}, {"role": "user", "content": parts}]},
        {**plain, "response_format": form, "tool_choice": "auto", "best_of": 1, "max_tokens": 90},
        {**plain, "response_format": None, "top_logprobs": 2},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    answers = answers_of(smolctl, path, model)
    assert texts(answers[1]) == texts(answers[0]) == texts(answers[3])
    assert {type(one) for one in json.loads(texts(answers[2])[0])} == {bool}
    assert {len(each) for each in answers[3]["completions"][0]["alternatives"]} == {2}
    assert [{**answer, "completions": 0} for answer in answers] == [{**row, "completions": 0} for row in rows]


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


FAULTS = {
    '{"prompt": 3}': '"prompt" is not a string',
    '{"messages": []}': '"messages" is not a list',
    '{"a": 1}': "neither a string nor an object",
    '{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}': "neither a string nor an object",
    "[" * 100_000: "not JSON",
    '{"prompt": "a", "temperature": NaN}': "not JSON",
    '{"prompt": "a", "temperature": "hot"}': '"temperature" is not a number',
    '{"prompt": "a", "temperature": true}': '"temperature" is not a number',
    '{"prompt": "a", "top_p": 3}': "top-p 3 is out of range",
    '{"prompt": "a", "top_k": 1.5}': '"top_k" is not an integer',
    '{"prompt": "a", "max_tokens": 0}': '"max_tokens" is not an integer of 1 or more',
    '{"prompt": "a", "n": 1000000000}': '"n" is not an integer from 1 to 128',
    '{"prompt": "a", "stop": [1]}': '"stop" is neither',
    '{"prompt": "a", "logit_bias": {"5": 1}}': '"logit_bias" is not supported',
    '{"prompt": "a", "frequency_penalty": 0.5}': '"frequency_penalty" is not supported',
    '{"prompt": "a", "max_new_tokens": 5}': '"max_new_tokens" is not supported',
    '{"prompt": "a", "stream": true}': '"stream" is not supported',
    '{"prompt": "a", "response_format": {"type": "yaml"}}': '"response_format" has an unknown form',
    '{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}': (
        "JSON schema: "
    ),
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "a part that is not text",
    '{"prompt": "a", "completions": "mine"}': "which is reserved for the answers",
    json.dumps("the cat " * 80): "tokens, but the model's context holds 96",
    json.dumps("the cat " * 20_000): "the prompt has 160,000 characters",
    json.dumps({"messages": [{"role": "user", "content": "hi", "a": "x" * 90_000}]}): "characters, but the",
    '{"messages": [{"role": "user", "content": "hi", "a": ' + "[" * 400 + "]" * 400 + "}]}": "levels deep",
}


def test_a_bad_line_is_one_error_and_the_others_are_answered(
    smolctl: Smolctl, model: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good: list[dict[str, Any]] = [{"prompt": "the cat", "error": "mine", "line": 7}, {"prompt": "on"}]
    lines = ["\ufeff" + json.dumps(good[0]), *FAULTS, json.dumps(good[1])]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\r\n".join(lines)))
    done = smolctl("sample", model, "--jsonl", "-", *SHORT)
    first, *bad, last = rows_of(done.out)
    assert done.code == 3
    assert f"stdin: {len(FAULTS)} of {len(lines)} prompts have no answer: line 2: " in done.err
    assert f"and {len(FAULTS) - 3} more lines" in done.err
    assert [{**row, "completions": 0} for row in (first, last)] == [{**row, "completions": 0} for row in good]
    assert [row["line"] for row in bad] == list(range(2, len(lines)))
    for row, (line, cause) in zip(bad, FAULTS.items(), strict=True):
        assert cause in row["error"]["message"]
        assert row["error"]["code"] == 3
        is_json = "not JSON" not in cause and "levels deep" not in cause
        assert row["input"] in ((json.loads(line), {"prompt": json.loads(line)}) if is_json else (line,))
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    assert "no chat template" in rows_of(smolctl("sample", other, "--jsonl", path).out)[0]["error"]["message"]


@pytest.mark.parametrize(("content", "cause"), [("\n", "contains no prompts"), (None, "No such file")])
def test_a_file_without_prompts_is_an_error(
    content: str | None, cause: str, smolctl: Smolctl, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    done = smolctl("sample", model, "--jsonl", path)
    assert done.code == 3
    assert cause in done.err


def test_a_line_has_settings_of_its_own_by_the_names_of_openai(
    smolctl: Smolctl, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    text = smolctl("sample", model, "--prompt", "the cat", *SHORT, "--json").json["completions"][0]["text"]
    given: list[tuple[dict[str, Any], tuple[object, ...]]] = [
        ({"max_tokens": 2, "temperature": 0}, ("--max-tokens", 2, "--temperature", 0)),
        ({"max_completion_tokens": 3, "seed": 5}, ("--max-tokens", 3, "--seed", 5)),
        ({"n": 3, "top_p": 0.5, "seed": 1}, ("-n", 3, "--top-p", 0.5, "--seed", 1)),
        ({"top_k": 4, "min_p": 0.2, "seed": -1}, ("--top-k", 4, "--min-p", 0.2, "--seed", -1)),
        ({"repetition_penalty": 1.5, "temperature": 0}, ("--repetition-penalty", 1.5, "--temperature", 0)),
        ({"stop": text[1], "temperature": 0}, ("--stop", text[1], "--temperature", 0)),
        ({"stop": ["x", text[2]], "temperature": 0}, ("--stop", text[2], "--temperature", 0)),
        ({"logprobs": True, "stream": False, "tools": None, "temperature": 0}, ("--temperature", 0)),
    ]
    path.write_text("".join(json.dumps({"prompt": "the cat", **values}) + "\n" for values, _ in given))
    common = ("--temperature", "1", "--max-tokens", "9", "--threads", "1")
    rows = rows_of(smolctl("sample", model, "--jsonl", path, *common).out)
    for row, (values, options) in zip(rows, given, strict=True):
        alone = smolctl("sample", model, "--prompt", "the cat", *common, *options, "--json").json
        assert without_logprobs(row) == without_logprobs(
            {"prompt": "the cat", **values, "completions": alone["completions"]}
        )


def without_logprobs(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what depends, in its last digits, on the sequences that decode beside it."""
    kept = [{**one, "logprobs": len(one["logprobs"])} for one in row.get("completions", ())]
    return {**row, "completions": kept}


def test_an_output_that_a_kill_has_torn_is_gone_on_with(
    smolctl: Smolctl, model: Path, tmp_path: Path
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    same = [{"prompt": "the cat", "id": "é"}] * 6  # alike, but each with tokens of its own
    prompts.write_text("".join(json.dumps(line) + "\n" for line in [*same, {"prompt": 1}, "on"]))
    options = ("--max-tokens", "20", "--temperature", "3", "--resume-output", output)
    command = ("sample", model, "--jsonl", prompts, *options)
    whole = smolctl(*command)
    assert (whole.code, whole.out) == (3, "")
    content = output.read_bytes()
    rows = list(map(without_logprobs, rows_of(output.read_text())))
    assert len({json.dumps(row["completions"]) for row in rows}) == 8
    ends = [at + 1 for at, byte in enumerate(content) if byte == 10]
    for cut in (0, 1, ends[0], ends[2] + 40, ends[5] + 5, ends[6] - 1, len(content) - 1, len(content)):
        output.write_bytes(content[:cut])
        again = smolctl(*command)
        assert again.code == 3
        assert list(map(without_logprobs, rows_of(output.read_text()))) == rows
        assert "1 of 8 prompts have no answer: line 7" in again.err
    output.write_bytes(content.replace(b'"length"', b'"interrupted"', 2))  # by Ctrl-C
    smolctl(*command)
    assert list(map(without_logprobs, rows_of(output.read_text()))) == rows


@pytest.mark.slow
def test_a_batch_that_was_killed_again_and_again_is_gone_on_with(
    smolctl: Smolctl, model: Path, tmp_path: Path
) -> None:
    prompts, output, expected = (tmp_path / name for name in ("prompts.jsonl", "answers", "expected"))
    lines = [{"prompt": "the cat", "id": at, "max_tokens": 1 + 40 * (at % 3)} for at in range(120)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("sample", model, "--jsonl", prompts, "--temperature", "3", "--threads", "1", "--resume-output")
    for rows in (10, 70):
        with start(*command, output) as process:
            until = time.monotonic() + LIMIT_S
            while not output.exists() or output.read_bytes().count(b"\n") < rows:
                assert process.poll() is None, "it ended before it was killed"
                assert time.monotonic() < until
            process.kill()
        assert output.read_bytes().count(b"\n") < len(lines), "it ended before it was killed"
    assert smolctl(*command, output).code == 0
    assert smolctl(*command, expected).code == 0
    found, whole = (list(map(without_logprobs, rows_of(path.read_text()))) for path in (output, expected))
    assert [row["id"] for row in whole] == list(range(120))
    assert found == whole


@pytest.mark.parametrize("content", ["hello", '{"a": 1}', "hello\n", '{"prompt": "on", "completions": []}\n'])
def test_a_file_that_is_no_output_of_these_prompts_is_left_as_it_is(
    content: str, smolctl: Smolctl, model: Path, tmp_path: Path
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "other"
    prompts.write_text('"the cat"\n')
    output.write_text(content)
    done = smolctl("sample", model, "--jsonl", prompts, "--resume-output", output)
    assert (done.code, output.read_text()) == (3, content)
    assert "line 1 is not the answer to prompt 1" in done.err


def test_ctrl_c_leaves_rows_that_can_be_gone_on_with(
    smolctl: Smolctl, model: Path, tmp_path: Path, interrupted_at: InterruptedAt
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [{"prompt": "the", "max_tokens": count} for count in (30, 2, 30, 2, 5, 5)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("sample", model, "--jsonl", prompts, "--batch-size", "2", "--threads", "1")
    whole = list(map(without_logprobs, rows_of(smolctl(*command).out)))
    with interrupted_at(8):
        done = smolctl(*command)
    rows = rows_of(done.out)
    reasons = [row["completions"][0]["finish_reason"] for row in rows]
    assert done.code == 130
    assert reasons[0] == "interrupted"
    assert without_logprobs(rows[1]) == whole[1]
    output.write_text(done.out)
    assert smolctl(*command, "--resume-output", output).code == 0
    assert list(map(without_logprobs, rows_of(output.read_text()))) == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_an_output_that_the_disk_refuses_is_a_failure_and_no_bad_input(
    smolctl: Smolctl, model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"the cat"\n')
    with small_disk(tmp_path / "disk", "4k") as disk:
        (disk / "ballast").write_bytes(bytes(4096))
        command = ("sample", model, "--jsonl", prompts, "--resume-output", disk / "answers.jsonl")
        called = smolctl(*command, "--max-tokens", 1)
        assert called.code == 1
        assert "answers.jsonl: No space left on device\n hint: Correct that" in called.err
        (disk / "ballast").unlink()
        assert smolctl(*command, "--max-tokens", 1).code == 0


@pytest.mark.parametrize("torn", [b"", b'{"prompt": "the c'])
def test_an_output_that_another_process_writes_is_left_to_it(
    torn: bytes, smolctl: Smolctl, model: Path, tmp_path: Path
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n' * 3)
    command = ("sample", model, "--jsonl", prompts, "--max-tokens", 1, "--resume-output", output)
    assert smolctl(*command).code == 0
    whole = output.read_bytes()
    begun = whole[: whole.index(b"\n") + 1] + torn
    output.write_bytes(begun)
    with writing_alone(output, output):
        called = smolctl(*command)
        assert called.code == 1
        assert "answers.jsonl: another process is writing it" in called.err
        assert output.read_bytes() == begun
    assert smolctl(*command).code == 0
    assert len(output.read_bytes().splitlines()) == 3
