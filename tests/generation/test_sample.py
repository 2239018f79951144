"""`smolctl sample`: one prompt by one model or by several, and what ends an answer."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from smolctl.data.tokenizer.bpe import train_bpe
from smolctl.data.tokenizer.tokenizer import Tokenizer
from tests.support.interruption import InterruptedAt
from tests.support.processes import Smolctl, call
from tests.support.tiny_models import SHORT, write_speaker
from tests.support.tokenizers import tokenizer


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


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("json_asked", [False, True])
def test_ctrl_c_prints_what_there_is(
    samples: int, json_asked: bool, smolctl: Smolctl, model: Path, interrupted_at: InterruptedAt
) -> None:
    options = ("-n", samples, "--max-tokens", "9", "--temperature", "0", "--threads", "1")
    command = ("sample", model, "--prompt", "the cat", *options, *(["--json"] if json_asked else []))
    whole = smolctl("sample", model, "--prompt", "the cat", *options, "--json").json["completions"]
    with interrupted_at(5 + samples):
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


@pytest.mark.parametrize(
    "asked", [("sample", "MODEL", "--prompt", "the cat", *SHORT), ("inspect-config", "no")]
)
def test_messages_that_cannot_be_written_change_no_result(
    asked: tuple[str, ...], smolctl: Smolctl, model: Path
) -> None:
    words = [model if word == "MODEL" else word for word in asked]
    whole = smolctl(*words)
    assert whole.err
    with Path("/dev/full").open("w") as full:
        done = call(*words, stderr=full)
    assert (done.code, done.out) == (whole.code, whole.out)


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
        row = json.loads(smolctl("sample", model, "--jsonl", path, *SHORT).out)
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
    several = smolctl("sample", model, "--prompt", "t", "-n", "3", *SHORT)
    assert "prompt of 1 token, first token" in several.err  # and none of them was cached
    assert "3 of 3 answers were cut at --max-tokens 5, before the model ended them." in several.err
    full = smolctl("sample", other, "--prompt", "the cat", "--max-tokens", "999", "--temperature", "0")
    assert "cut where the model's context is full" in full.err or "cut" not in full.err
