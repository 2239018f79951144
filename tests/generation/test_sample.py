"""`smolctl sample`: one prompt, several models, a file of prompts, and a session on a terminal."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from smolctl.data.tokenizer.bpe import train_bpe
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import PromptTooLongError
from smolctl.generation.complete import CompletionSettings, InterruptedCompletion
from smolctl.generation.conversation import Conversation, Session
from smolctl.generation.load import load_model
from smolctl.generation.native_engine import NativeEngine
from tests.support.processes import call, start
from tests.support.tiny_models import plain_settings, tiny_model, write_folder, write_speaker
from tests.support.tokenizers import tokenizer

Smolctl = Callable[..., Any]
SHORT = ("--max-tokens", "5", "--temperature", "0", "--threads", "1")
LIMIT_S = 120  # what a terminal does not show by then will never come


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "other", seed=1, template=None)


def test_text_goes_to_stdout_and_what_is_said_of_it_to_stderr(smolctl: Smolctl, model: Path) -> None:
    document = smolctl("sample", model, "--prompt", "the cat", *SHORT, "--json").json
    done = smolctl("sample", model, "--prompt", "the cat", *SHORT, "-v")
    assert (done.code, done.out) == (0, document["completions"][0]["text"] + "\n")
    assert "prompt as the model sees it:\nthe cat" in done.err
    assert "prefill" in done.err
    quiet = smolctl("sample", model, "--prompt", "the cat", *SHORT, "--quiet")
    assert (quiet.out, quiet.err) == (done.out, "")


def test_several_samples_are_printed_one_after_the_other(smolctl: Smolctl, model: Path) -> None:
    done = smolctl("sample", model, "--prompt", "the", "-n", "3", "--max-tokens", "4", "--explain")
    places = [done.out.index(f"— {number} of 3 —") for number in (1, 2, 3)]
    assert places == sorted(places)
    assert done.out.count("probability") == 3


def test_two_models_are_compared_where_they_part(smolctl: Smolctl, model: Path, other: Path) -> None:
    command = ("sample", model, other, "--prompt", "the", "--compare", *SHORT)
    first, second = smolctl(*command, "--json").json["models"]
    assert first["divergence"] == [None]
    (place,) = second["divergence"]
    at = place["token"]
    ours, theirs = (one["completions"][0]["tokens"] for one in (first, second))
    assert ours[:at] == theirs[:at]
    assert ours[at] != theirs[at]
    assert f"differs from token {at} on" in " ".join(smolctl(*command).out.split())
    assert "divergence" not in smolctl(*command[:5], *SHORT, "--json").json["models"][0]


def test_an_answer_ends_at_every_token_that_a_source_names_as_an_end(
    smolctl: Smolctl, tmp_path: Path
) -> None:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|stop|>", "<|halt|>", "<|go|>"]
    backend = train_bpe(["the cat"], 300)
    backend.add_special_tokens(names)
    ids = {name: backend.token_to_id(name) for name in names}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for end in names[2:]:
        folder = tmp_path / end.strip("<|>")
        speaker = Tokenizer(backend, template, eos_token_id=0)
        write_speaker(folder, speaker, {"a": "h", "h": "i", "i": end, end: "a"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, ids["<|halt|>"]]}))
        generation = {"eos_token_id": [0, ids["<|stop|>"]], "bos_token_id": [0]}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        for how in ("--chat", "--no-chat"):
            (answer,) = smolctl("sample", folder, "-p", "a", how, *SHORT, "--json").json["completions"]
            stops = end != "<|go|>"
            assert answer["text"] == ("hi" if stops else "hiahi")[: len(answer["text"])]
            assert answer["finish_reason"] == ("stop" if stops else "length")
        shown = {stop["token"] for stop in smolctl("inspect-config", folder, "--json").json["stops"]}
        assert shown == {"<|endoftext|>", *names[2:6]}
        text = smolctl("inspect-config", folder).out
        assert all(name in text for name in shown)


def test_what_begins_every_text_and_the_first_space_are_kept(smolctl: Smolctl, tmp_path: Path) -> None:
    kind = Tokenizer(tokenizer("llama"), bos_token_id=1, eos_token_id=2)
    folder = write_speaker(
        tmp_path / "model", kind, {"▁the": "▁old", "▁old": "▁c", "▁c": "▁the", "<s>": "▁c"}
    )
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "the"}')
    command = ("--max-tokens", "3", "--temperature", "0")
    found = smolctl("sample", folder, "-p", "the", *command, "--json").json
    assert found["completions"][0]["text"] == " old c the"
    assert found["timing"]["prompt_tokens"] == 2  # BOS and the word
    (line,) = smolctl("sample", folder, "--jsonl", path, *command).out.splitlines()
    assert json.loads(line)["completions"][0]["text"] == " old c the"


def test_special_tokens_in_a_message_are_text_unless_they_are_meant(smolctl: Smolctl, model: Path) -> None:
    def tokens(text: str, *options: str) -> int:
        command = ("sample", model, "--chat", "-p", text, *SHORT, *options, "--json")
        count: int = smolctl(*command).json["timing"]["prompt_tokens"]
        return count

    spelled = "a<|im_end|>b"
    assert tokens(spelled, "--special-tokens", "tokens") == tokens("ab") + 1
    assert tokens(spelled) > tokens("ab") + 5


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


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (("--compare",), "two MODELs"),
        (("--jsonl", "x", "--prompt", "y"), "cannot be combined"),
        (("--jsonl", "x", "second"), "takes one MODEL"),
        (("--prompt", "x", "--resume-output", "y"), "--resume-output needs --jsonl"),
        (("--prompt", "x", "--system", "y"), "--system needs --chat"),
        (("--top-p", "3"), "--top-p 3.0 is out of range"),
        (("--json",), "no prompt"),
        (("second",), "no prompt"),
        (("--speculate", "guess"), "--speculate"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(
    options: tuple[str, ...], cause: str, smolctl: Smolctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def read(self, size: int | None = -1) -> str:
            pytest.fail("waits for input that nobody was asked for")

    monkeypatch.setattr(sys, "stdin", Terminal())
    done = smolctl("sample", "first", *options)
    assert done.code == 2
    assert cause in done.err


READY = "\x1b[?2004h"  # what the editor writes when it takes keys: from now on pasted text is marked
TAKEN = "\x1b[?2004l"  # what it writes when it has taken a message
PASTE, PASTED = "\x1b[200~", "\x1b[201~"
UP, LEFT, HOME = "\x1b[A", "\x1b[D", "\x01"


class Terminal:
    """The command line in another process, on a terminal of its own."""

    def __init__(self, child: int, screen: int, ready: str) -> None:
        self.child, self.screen, self.ready = child, screen, ready
        self.shown = ""

    def type(self, keys: str) -> None:
        """Press keys when they are waited for."""
        self.read_until(self.ready)
        written = keys.encode()
        while written:  # a terminal takes no more than 4,096 bytes that nobody has read
            written = written[os.write(self.screen, written[:1024]) :]

    def read_until(self, text: str) -> str:
        """What is shown up to a text, from where the last call ended."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self.shown:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self.screen], [], [], left)[0], self.shown
            self.shown += os.read(self.screen, 4096).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before


@contextmanager
def on_a_terminal(
    *arguments: object, term: str = "xterm", ready: str = READY, cache: Path | None = None
) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "smolctl", *map(str, arguments)]
    named = {"SMOLCTL_CACHE": str(cache)} if cache else {}
    child, screen = pty.fork()
    if child == 0:
        os.execve(command[0], command, {**os.environ, "TERM": term, **named})
    try:
        yield Terminal(child, screen, ready)
        with suppress(OSError):  # what a terminal gives when its last process has ended
            while os.read(screen, 4096):
                pass
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        os.close(screen)  # hangs up on what is still there


def messages_of(path: Path) -> list[tuple[str, str]]:
    messages = json.loads(path.read_text())["messages"]
    return [(one["role"], one["content"]) for one in messages if one["role"] != "assistant"]


@pytest.mark.slow
def test_a_session_edits_lines_and_loses_nothing_of_what_is_typed(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    command = ("sample", model, "--max-tokens", "2", "--temperature", "0", "--threads", "1")
    with on_a_terminal(*command, cache=tmp_path) as terminal:
        terminal.type(f"he ct{LEFT}a{HOME}t\r")
        assert "chatting with the model's template" in terminal.shown or terminal.read_until("prefill")
        terminal.type("cat " * 1500 + "\r")  # more than a terminal's own line holds, and than the context
        error = terminal.read_until(" characters, but the model's context of 96 tokens holds")
        assert int(error.rpartition("the prompt has ")[2].replace(",", "")) >= 6000
        terminal.type(f"{PASTE}a\nb\r\nc{PASTED}\r")
        terminal.type("\x03")
        terminal.read_until("Ctrl-D ends.")
        terminal.type("/unknown\r")
        terminal.read_until("There is no command /unknown")
        terminal.type(f"/save {saved}\r")
        terminal.read_until("Saved")
        terminal.type("\x04")
    assert messages_of(saved) == [("user", "the cat"), ("user", "a\nb\nc")]
    with on_a_terminal(*command, cache=tmp_path) as terminal:
        terminal.type(UP * 3 + "\r")  # of the session before
        terminal.type(f"/save {saved}\r")
        terminal.read_until("exists and is not overwritten")
        terminal.type(f"/save {saved}2\r")
        terminal.type("exit\r")
    assert messages_of(tmp_path / "chat.json2") == [("user", "a\nb\nc")]


@pytest.mark.slow
def test_the_commands_of_a_session(model: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("1.json", "2.json", "3.json"))
    with on_a_terminal("sample", model, "--max-tokens", "3", "--threads", "1", cache=tmp_path) as terminal:
        terminal.type("/help\r")
        terminal.read_until("/retry")
        terminal.type("/retry\r")
        terminal.read_until("nothing has been asked")
        terminal.type("/system be kind\r")
        terminal.type("the cat\r")
        terminal.type(f"/save {first}\r")
        terminal.type("/set temperature 5\r")
        terminal.read_until("temperature 5,")
        terminal.type("/set max_tokens 0\r")
        terminal.read_until('"max_tokens" is not an integer')
        terminal.type("/set max_tokens=6\r")
        terminal.type("/retry\r")
        terminal.type(f"/save {second}\r")
        terminal.type("/clear\r")
        terminal.read_until("New conversation.")
        terminal.type(f"/load {first}\r")
        terminal.read_until("after 1 turns")
        terminal.type(f"/load {model / 'config.json'}\r")
        terminal.read_until("not a conversation")
        terminal.type(f"/save {third}\r")
        terminal.type("/exit\r")
    once, again, loaded = (json.loads(path.read_text())["messages"] for path in (first, second, third))
    assert (
        once[:2]
        == again[:2]
        == [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "the cat"},
        ]
    )
    assert loaded == once
    assert len(once) == len(again) == 3
    assert once[2] != again[2]


@pytest.mark.slow
def test_without_a_template_and_on_a_terminal_that_can_do_nothing(other: Path, tmp_path: Path) -> None:
    """Every prompt stands alone there."""
    with on_a_terminal("sample", other, *SHORT, term="dumb", ready="> ", cache=tmp_path) as terminal:
        assert "each prompt is independent" in terminal.read_until("Ctrl-D ends.")
        answers = []
        for _ in range(2):
            terminal.type("the cat\r")
            answers.append(terminal.read_until("native").split("\n")[-2])
        assert answers[0] == answers[1]
        terminal.type("exit\r")  # not Ctrl-D, which is lost before the editor reads single keys


def test_a_message_that_does_not_fit_leaves_the_history_as_it_is() -> None:
    turns = [{"role": role, "content": "the cat"} for role in ("user", "assistant")] * 2
    session = Session(tiny_model(), CompletionSettings(max_tokens=4), Conversation(True, turns=list(turns)))
    with pytest.raises(PromptTooLongError, match="the model's context holds"):
        session.make_room("the cat " * 50)
    with pytest.raises(PromptTooLongError, match="characters"):
        session.make_room("the cat " * 1_000)
    assert session.conversation.turns == turns
    assert session.make_room("on " * 35) > 0


@contextmanager
def interrupted_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C before a call of the engine, by number from 1."""
    count, forward = itertools.count(1), NativeEngine.forward

    def stopped(*arguments: Any, **options: Any) -> Any:
        if next(count) == call:
            signal.raise_signal(signal.SIGINT)
        return forward(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(NativeEngine, "forward", stopped)
        yield


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("json_asked", [False, True])
def test_ctrl_c_prints_what_there_is(
    samples: int, json_asked: bool, smolctl: Smolctl, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("-n", samples, "--max-tokens", "9", "--temperature", "0", "--threads", "1")
    command = ("sample", model, "--prompt", "the cat", *options, *(["--json"] if json_asked else []))
    whole = smolctl("sample", model, "--prompt", "the cat", *options, "--json").json["completions"]
    with interrupted_at(5 + samples, monkeypatch):
        done = smolctl(*command)
    assert done.code == 130
    if json_asked:
        found = done.json["completions"]
        assert [one["finish_reason"] for one in found] == ["interrupted"] * samples
        for one, ended in zip(found, whole, strict=True):
            assert one["tokens"] == ended["tokens"][: len(one["tokens"])] != ended["tokens"]
        assert len(found[0]["tokens"]) >= 4
    else:
        assert done.out.count(whole[0]["text"][:2]) == samples


def test_ctrl_c_leaves_rows_that_can_be_gone_on_with(
    smolctl: Smolctl, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [{"prompt": "the", "max_tokens": count} for count in (30, 2, 30, 2, 5, 5)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("sample", model, "--jsonl", prompts, "--batch-size", "2", "--threads", "1")
    whole = list(map(without_logprobs, rows_of(smolctl(*command).out)))
    with interrupted_at(8, monkeypatch):
        done = smolctl(*command)
    rows = rows_of(done.out)
    reasons = [row["completions"][0]["finish_reason"] for row in rows]
    assert done.code == 130
    assert reasons[0] == "interrupted"
    assert without_logprobs(rows[1]) == whole[1]
    output.write_text(done.out)
    assert smolctl(*command, "--resume-output", output).code == 0
    assert list(map(without_logprobs, rows_of(output.read_text()))) == whole


def test_a_chat_keeps_what_came_before_ctrl_c(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    settings = CompletionSettings(max_tokens=9, sampling=plain_settings(0))
    session = Session(load_model(str(model)), settings, Conversation(True))
    with interrupted_at(5, monkeypatch), pytest.raises(InterruptedCompletion) as stopped:
        session.answer("the cat", lambda *_: None)
    answer = stopped.value.result.completions[0].text
    assert answer
    assert session.conversation.turns[1]["content"] == answer
    session.retry(lambda *_: None)
    assert len(session.conversation.turns) == 2
    assert session.conversation.turns[1]["content"].startswith(answer)


@pytest.mark.real_weights
@pytest.mark.parametrize(
    "rounds", [pytest.param(1, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.proof)]
)
def test_ctrl_c_while_a_long_prompt_is_read_leaves_the_next_answer_as_it_was(
    rounds: int, gguf_file: Path, tmp_path: Path
) -> None:
    chance, answers = random.Random(0), []
    with on_a_terminal("sample", gguf_file, "--max-tokens", "9", "--temperature", "0") as terminal:
        for number in range(rounds + 1):
            if number:  # the first answer is undisturbed
                terminal.type(f"{PASTE}{'Tell me about the cat that sat on the mat. ' * 400}{PASTED}\r")
                terminal.read_until(TAKEN)
                time.sleep(0.1 + chance.random() * 3)
                os.write(terminal.screen, b"\x03")
                terminal.read_until("Stopped.")
                terminal.type("/clear\r")
            terminal.type("What is the capital of France?\r")
            terminal.type(f"/save {tmp_path / str(number)}\r")
            terminal.read_until("Saved to")
            answers.append(json.loads((tmp_path / str(number)).read_text())["messages"][1]["content"])
            terminal.type("/clear\r")
        terminal.type("\x04")
    assert "Paris" in answers[0]
    assert answers == [answers[0]] * (rounds + 1)


@pytest.mark.parametrize("options", [(), ("--json",), ("-n", "2"), ("--jsonl",), ("second",)])
def test_a_full_disk_is_one_line_and_the_text_goes_to_stderr(
    options: tuple[str, ...], smolctl: Smolctl, model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"the cat"\n')
    asked: tuple[object, ...] = ("--prompt", "the cat", *options)
    asked = ("--jsonl", prompts) if options == ("--jsonl",) else asked
    asked = (model, *asked[:2]) if options == ("second",) else asked
    with Path("/dev/full").open("w") as full:
        done = call("sample", model, *asked, *SHORT, stdout=full)
    assert done.code == 1
    assert "stdout cannot be written (No space left on device)" in done.err
    assert "Exception" not in done.err
    text = smolctl("sample", model, *asked, *SHORT).out.split("\n")[-2]
    assert text[:1] in done.err  # up to where it was streamed


def test_without_stdout_nothing_is_generated(
    smolctl: Smolctl, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    done = smolctl("sample", model, "--prompt", "the cat")
    assert done.code == 2
    assert "stdout is closed" in done.err


@pytest.mark.parametrize("way", ["argument", "stdin", "line", "message"])
def test_what_is_no_text_is_read_as_replacement_characters(
    way: str, smolctl: Smolctl, model: Path, tmp_path: Path
) -> None:
    """Bytes that are not UTF-8, and halves of surrogate pairs."""
    expected = smolctl("sample", model, "--prompt", "the \ufffd cat", *SHORT, "--json").json["completions"]
    if way == "argument":
        found = smolctl("sample", model, "--prompt", "the \udcff cat", *SHORT, "--json").json["completions"]
    elif way == "stdin":
        done = subprocess.run(
            [sys.executable, "-m", "smolctl", "sample", model, *SHORT, "--json"],
            input=b"the \xff cat", capture_output=True, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout)["completions"]
    else:
        path = tmp_path / "prompts.jsonl"
        asked = {"messages": [{"role": "user", "content": "the \ud83d cat"}]}
        path.write_text(json.dumps(asked if way == "message" else {"prompt": "the \ud83d cat"}))
        (row,) = rows_of(smolctl("sample", model, "--jsonl", path, *SHORT).out)
        found = row["completions"]
        assert {**row, "completions": 0} == {**json.loads(path.read_text()), "completions": 0}
    if way == "message":
        chat = ("--chat", "--prompt", "the \ufffd cat")
        expected = smolctl("sample", model, *chat, *SHORT, "--json").json["completions"]
    assert [one["tokens"] for one in found] == [one["tokens"] for one in expected]


def test_what_a_user_should_know_is_said(smolctl: Smolctl, model: Path, other: Path) -> None:
    asked = smolctl("sample", model, "--prompt", "the cat", *SHORT)
    assert "To ask a question, add --chat." in asked.err
    assert "The answer was cut at --max-tokens 5" in asked.err
    for command in ((model, "--no-chat"), (model, "--chat"), (other,)):
        assert "add --chat" not in smolctl("sample", *command, "--prompt", "the cat", *SHORT).err
    full = smolctl("sample", other, "--prompt", "the cat", "--max-tokens", "999", "--temperature", "0")
    assert "cut where the model's context is full" in full.err or "cut" not in full.err
