"""`smolctl sample`: one prompt, several models, a file of prompts, and a session on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from smolctl.data.tokenizer.bpe import train_bpe
from smolctl.data.tokenizer.tokenizer import Tokenizer
from tests.support.tiny_models import write_folder, write_speaker
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
    '{"prompt": "a", "completions": "mine"}': "under which the answers are written",
    json.dumps("the cat " * 200): "the prompt has",
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
        is_json = "not JSON" not in cause
        assert row["input"] in ((json.loads(line), {"prompt": json.loads(line)}) if is_json else (line,))
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    assert "no chat template" in rows_of(smolctl("sample", other, "--jsonl", path).out)[0]["error"]["message"]


@pytest.mark.parametrize(("content", "cause"), [("\n", "no prompts in it"), (None, "No such file")])
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
        assert _rounded(row) == _rounded({"prompt": "the cat", **values, "completions": alone["completions"]})


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose log-probabilities, which depend a little on what decodes beside it, are rounded."""
    rounded = [
        {**one, "logprobs": [round(logprob, 3) for logprob in one["logprobs"]]}
        for one in row.get("completions", ())
    ]
    return {**row, "completions": rounded}


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
    rows = list(map(_rounded, rows_of(output.read_text())))
    assert len({json.dumps(row["completions"]) for row in rows}) == 8
    ends = [at + 1 for at, byte in enumerate(content) if byte == 10]
    for cut in (0, 1, ends[0], ends[2] + 40, ends[5] + 5, ends[6] - 1, len(content) - 1, len(content)):
        output.write_bytes(content[:cut])
        again = smolctl(*command)
        assert again.code == 3
        assert list(map(_rounded, rows_of(output.read_text()))) == rows
        assert "1 of 8 prompts have no answer: line 7" in again.err
    output.write_bytes(content.replace(b'"length"', b'"interrupted"', 2))  # by Ctrl-C
    smolctl(*command)
    assert list(map(_rounded, rows_of(output.read_text()))) == rows


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
        (("--jsonl", "x", "--prompt", "y"), "exclude each other"),
        (("--jsonl", "x", "second"), "takes one MODEL"),
        (("--prompt", "x", "--resume-output", "y"), "--resume-output belongs to --jsonl"),
        (("--prompt", "x", "--system", "y"), "--system belongs to a chat"),
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


class Terminal:
    """The command line in another process, on a terminal of its own."""

    def __init__(self, child: int, screen: int) -> None:
        self.child, self.screen = child, screen
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def read_until(self, text: str) -> str:
        """What is shown up to a text, from where the last call ended."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self.shown:
            assert self.shows_more(deadline - time.monotonic()), self.shown
            self.shown += os.read(self.screen, 4096).decode()
        before, _, self.shown = self.shown.partition(text)
        return before

    def shows_more(self, seconds: float) -> bool:
        return bool(select.select([self.screen], [], [], max(0.0, seconds))[0])

    def interrupt(self) -> None:
        """Ctrl-C at a prompt. As people do, press it again when nothing happens.

        CPython's readline does not see one that comes after it has written the prompt and before it
        waits for a key: about 1 in 100 on a busy machine, where this test answers the prompt at once.
        """
        for _ in range(10):
            self.type("\x03")
            if self.shows_more(2):
                return


@contextmanager
def on_a_terminal(*arguments: object) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "smolctl", *map(str, arguments)]
    child, screen = pty.fork()
    if child == 0:  # a new interpreter: pytest has imported readline into this one
        os.execve(command[0], command, {**os.environ, "TERM": "dumb"})
    try:
        yield Terminal(child, screen)
        with suppress(OSError):  # what a terminal gives when its last process has ended
            while os.read(screen, 4096):
                pass
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        os.close(screen)  # hangs up on what is still there


@pytest.mark.slow
def test_a_session_edits_lines_remembers_and_goes_on_after_errors(model: Path) -> None:
    with on_a_terminal("sample", model, *SHORT, "-v") as terminal:
        assert "chatting with the model's template" in terminal.read_until("> ")
        terminal.type("the ct\x1b[Da\r")  # an arrow key goes back by one
        assert "\x1b[D" not in terminal.read_until("prefill")
        terminal.read_until("> ")
        terminal.type("\x1b[A\r")  # the line before, out of the history
        assert "the cat" in terminal.read_until("of them cached")
        terminal.read_until("> ")
        terminal.type("cat " * 80 + "\r")
        terminal.read_until("error: ")
        terminal.read_until("> ")
        terminal.type("/help\r")
        terminal.read_until("Ctrl-D ends.")
        terminal.read_until("> ")
        terminal.type("/reset\r")
        terminal.read_until("New conversation.")
        terminal.read_until("> ")
        terminal.interrupt()
        terminal.read_until("Ctrl-D ends.")
        terminal.read_until("> ")
        terminal.type("\x04")


@pytest.mark.slow
def test_without_a_template_every_prompt_of_a_session_stands_alone(other: Path) -> None:
    with on_a_terminal("sample", other, *SHORT) as terminal:
        assert "each prompt stands alone" in terminal.read_until("> ")
        answers = []
        for _ in range(2):
            terminal.type("the cat\r")
            answers.append(terminal.read_until("native"))
            terminal.read_until("> ")
        assert answers[0] == answers[1]
        terminal.type("\x04")
