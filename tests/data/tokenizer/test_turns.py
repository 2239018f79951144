"""What of a conversation is trained on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken

from smolctl.data.text.conversations import Conversation, RowError, Shape
from smolctl.data.tokenizer.chatml import CHATML, with_chatml
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokenizer.turns import NO_TOOLS, NO_TURN_END, TrainedOn, TurnEncoder, Turns
from smolctl.errors import InputError
from tests.support.tokenizers import MAKERS, tokenizer

TALK = ("Be brief.", "What is\na mat?", " A mat, or a rug. ", "Why?", "It lies <|im_end|> there.")
ROLES = ("system", "user", "assistant", "user", "assistant")
HEADERS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MARKED = (
    "{% macro said(m) %}{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{{ said(m) }}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
) + ASKS


def conversation(
    *contents: str, roles: tuple[str, ...] = ROLES, completion: int | None = None
) -> Conversation:
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, contents, strict=False))
    return Conversation("here", Shape.MESSAGES, messages, completion=completion)


def chat_tokenizer(kind: str, template: str | None = None) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tokenizer(kind).to_str())
    backend.add_special_tokens(
        [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    )
    found = with_chatml(Tokenizer(backend))
    found.chat_template = template or found.chat_template
    return found


def encode(one: Conversation, kind: str = "gpt2", loss: TrainedOn = "assistant", **options: Any) -> Turns:
    (turns,) = TurnEncoder(chat_tokenizer(kind, options.get("template")), loss).encode([one])
    assert isinstance(turns, Turns), turns
    return turns


def said(turns: Turns, by: Tokenizer) -> list[str]:
    """The runs of tokens that are trained on, in text."""
    found = []
    for is_trained, run in itertools.groupby(
        zip(turns.is_trained, turns.ids, strict=True), key=lambda x: x[0]
    ):
        ids = [int(token) for _, token in run]
        if is_trained:
            found.append(by.decode(ids, skip_special=False))
    return found


@pytest.mark.parametrize("kind", MAKERS)
def test_answers_and_the_tokens_that_end_them_are_trained_on_and_nothing_else(kind: str) -> None:
    by = chat_tokenizer(kind)
    turns = encode(conversation(*TALK), kind)
    ends = by.backend.token_to_id("<|im_end|>")
    assert (turns.ids == ends).sum() == 5  # the spelled one is text
    runs = said(turns, by)
    assert len(runs) == 2
    assert all(run.endswith("<|im_end|>") for run in runs)
    assert turns.is_trained[turns.ids == ends].tolist() == [False, False, True, False, True]
    messages = [dict(message) for message in conversation(*TALK).messages]
    for number in (2, 4):  # the ids before an answer are the prompt that asks for it
        prompt = by.chat_prompt(messages[:number]).ids
        assert tuple(turns.ids[: len(prompt)]) == prompt
        assert turns.is_trained[len(prompt)]
        if not kind.startswith("t5"):  # which makes one space of the header's line end and the answer's space
            assert not turns.is_trained[len(prompt) - 1]


def test_what_is_trained_on_can_be_the_completion_or_all() -> None:
    by = chat_tokenizer("gpt2")
    last = encode(conversation(*TALK), loss="completion")
    assert said(last, by) == said(encode(conversation(*TALK)), by)[1:]
    named = encode(conversation(*TALK, completion=2), loss="completion")
    assert len(said(named, by)) == 2
    everything = encode(conversation(*TALK), loss="all")
    assert everything.is_trained.tolist() == [False] + [True] * (len(everything.ids) - 1)


@pytest.mark.parametrize("template", [None, MARKED])
def test_an_answer_of_weight_0_is_read_and_not_trained_on(template: str | None) -> None:
    by, talk = chat_tokenizer("gpt2"), conversation(*TALK)
    messages = [dict(message) for message in talk.messages]
    messages[2]["weight"], messages[4]["weight"] = 0, 1
    weighed = encode(replace(talk, messages=tuple(messages)), template=template)
    plain = encode(talk, template=template)
    assert weighed.ids.tolist() == plain.ids.tolist()
    assert said(weighed, by) == said(plain, by)[1:]


def test_a_template_of_which_nobody_can_tell_the_answers_is_refused() -> None:
    forgets = HEADERS.replace("{{ m.content }}", "{{ m.content if loop.last else '' }}") + ASKS
    with pytest.raises(InputError, match="renders an answer differently"):
        encode(conversation(*TALK), template=forgets)
    never_ends = HEADERS.replace("<|im_end|>", "") + ASKS
    with pytest.raises(InputError, match="without a token that stops the model"):
        encode(conversation(*TALK), template=never_ends)
    other_header = HEADERS + ASKS.replace("assistant", "model")
    with pytest.raises(InputError, match="renders an answer differently"):
        encode(conversation(*TALK), template=other_header)


@pytest.mark.parametrize("kind", ["gpt2", "gpt4"])
def test_marked_answers_are_those_of_transformers(kind: str) -> None:
    from transformers import PreTrainedTokenizerFast

    template = MARKED.replace(
        "{{ said(m) }}", "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    )
    by, one = chat_tokenizer(kind, template), conversation(*TALK[:4], "It lies there. 🎉")
    theirs: Any = PreTrainedTokenizerFast(tokenizer_object=by.backend).apply_chat_template(
        [dict(message) for message in one.messages],
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    turns = encode(one, kind, template=template)
    assert turns.ids.tolist() == theirs["input_ids"]
    assert turns.is_trained.tolist() == list(map(bool, theirs["assistant_masks"]))


def test_marked_answers_are_found_wherever_the_template_writes_them() -> None:
    by = chat_tokenizer("gpt2", MARKED)
    one = conversation(*TALK)
    answers = ["A mat, or a rug.<|im_end|>", "It lies <|im_end|> there.<|im_end|>"]
    assert said(encode(one, template=MARKED), by) == answers  # in a macro; an end that is spelled is text
    assert said(encode(one, template=MARKED, loss="completion"), by) == answers[1:]
    in_two = MARKED.replace(
        "{{ m.content | trim }}", "It{% endgeneration %} {% generation %}{{ m.content[3:] }}"
    )
    assert said(encode(one, template=in_two, loss="completion"), by) == [
        "It",
        "lies <|im_end|> there.<|im_end|>",
    ]
    changing = "{{ m.content if loop.last else '' }}"  # no text is the beginning of a longer one
    assert said(encode(one, template=MARKED.replace("{{ m.content }}", changing)), by) == answers
    for space in ("", "\n "):
        outside = MARKED.replace("<|im_end|>{% e", "{% e").replace(
            "{% endm", f"{{{{ {space!r} }}}}<|im_end|>{{% endm"
        )
        turns = encode(one, template=outside)
        assert said(turns, by) == [answer[:-10] + space + "<|im_end|>" for answer in answers]
        assert turns.remarks == (NO_TURN_END,)
    assert encode(one, template=MARKED).remarks == ()
    with pytest.raises(InputError, match="without a token that stops the model"):
        encode(one, template=MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}"))


def test_tools_and_calls_of_them_are_what_the_template_makes_of_them() -> None:
    roles = ("user", "assistant", "tool", "assistant")
    one = conversation("Why?", "", "7", "So.", roles=roles)
    call = {"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
    messages = (one.messages[0], {**one.messages[1], "tool_calls": [call]}, *one.messages[2:])
    called = replace(one, messages=messages, tools=({"name": "f"},))
    writes = (
        "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
        "{% endfor %}"
    ) + ASKS
    turns, by = encode(called, template=writes), chat_tokenizer("gpt2", writes)
    assert by.decode(turns.ids.tolist(), skip_special=False).startswith('[[{"name": "f"}]]<|im_start|>')
    function = '{"name": "f", "arguments": {"x": "<|im_end|>"}}'
    assert said(turns, by) == [f"{function}<|im_end|>", "So.<|im_end|>"]
    assert turns.remarks == ()
    (refused,) = TurnEncoder(chat_tokenizer("gpt2")).encode([called])
    assert "calls tools, which the chat template does not render" in str(refused)
    assert encode(
        replace(one, messages=one.messages[::2] + one.messages[3:], tools=called.tools)
    ).remarks == (NO_TOOLS,)


def test_a_row_that_the_template_refuses_is_counted_and_the_others_go_on() -> None:
    strict = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + HEADERS + ASKS
    )
    encoder = TurnEncoder(chat_tokenizer("gpt2", strict))
    good = conversation("Why?", "So.", roles=("user", "assistant"))
    bad, fine = encoder.encode([conversation(*TALK), good])
    assert isinstance(bad, RowError)
    assert "user first" in str(bad)
    assert isinstance(fine, Turns)


def test_chatml_needs_its_tokens() -> None:
    with pytest.raises(InputError, match=r"has no <\|im_start\|>"):
        with_chatml(Tokenizer(tokenizer("gpt2")))
    by = chat_tokenizer("gpt2")
    assert by.chat_template == CHATML
    assert by.token(by.eos_token_id) == "<|im_end|>"
    assert "<|im_end|>" in by.end_tokens
