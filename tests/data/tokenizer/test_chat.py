"""Chat templates render as transformers renders them, and cannot do harm."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from smolctl import templates
from smolctl.data.tokenizer.bpe import train_bpe
from smolctl.data.tokenizer.chat import render_chat
from smolctl.data.tokenizer.tokenizer import load_tokenizer
from smolctl.errors import InputError, PromptTooLongError

CHATS = [
    [{"role": "user", "content": "What is 2 < 3 & 'x'?"}],
    [
        {"role": "system", "content": "  You are terse.\n"},
        {"role": "user", "content": "Grüß 🎉"},
        {"role": "assistant", "content": "Hi.\n"},
        {"role": "user", "content": "{{ 7 * 7 }}"},
    ],
]
TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
TURNS = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- '[SYS]' + message['content'] | trim + '[/SYS]' }}
        {%- continue %}
    {%- endif %}
    {% if loop.index0 > 9 %}{% break %}{% endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {%- else %}
{{ message | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '>' }}
{%- endif %}
"""
NAMESPACES = """{% set ns = namespace(count=0, last='') %}
{% set names = dict(user='U', assistant='A', system='S') %}
{% for message in messages %}
  {% set ns.count = ns.count + 1 %}
  {% set ns.last = message.role %}
{{ names[message.role] }}{{ ns.count }}: {{ message.content | upper }}
{% endfor %}
{% if tools %}tools{% endif %}{{ ns.last }} {{ {'a': [1, 2]} | tojson(indent=2) }}
{{ strftime_now('%Y') }}
"""


def theirs(template: str, messages: list[dict[str, str]], prompt: bool) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(["a"], 300), **TOKENS)
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("template", [TURNS, NAMESPACES], ids=["turns", "namespaces"])
def test_hand_written_templates_render_as_in_transformers(
    template: str, messages: list[dict[str, str]], prompt: bool
) -> None:
    assert render_chat(template, messages, TOKENS, prompt) == theirs(template, messages, prompt)


@pytest.mark.real_weights
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS)
def test_smollm2_template_renders_as_in_transformers(
    gguf_file: Path, messages: list[dict[str, str]], prompt: bool
) -> None:
    tokenizer = load_tokenizer(str(gguf_file))
    template = tokenizer.chat_template
    assert template is not None
    rendered = render_chat(template, messages, tokenizer.named_tokens, prompt)
    assert rendered == theirs(template, messages, prompt)
    assert messages[-1]["content"] in rendered


def test_refusal_of_the_template_is_told() -> None:
    with pytest.raises(InputError, match="only users may speak"):
        render_chat("{{ raise_exception('only users may speak') }}", CHATS[0], {})


def test_broken_template_is_named_with_its_line() -> None:
    with pytest.raises(InputError, match="broken at line 2"):
        render_chat("fine\n{% if %}", CHATS[0], {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ dict.__subclasses__() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_templates_cannot_reach_out_of_the_sandbox(template: str) -> None:
    with pytest.raises(InputError):
        render_chat(template, CHATS[0], {})


# Templates that fail in their own ways, each at a line of theirs, with a word of what is said.
FAULTY = {
    "a loop control without a loop": ("{% break %}", "broken: 'break' outside loop"),
    "blocks nested too deeply for Python": ("{% for a in b %}" * 25 + "{% endfor %}" * 25, "nested blocks"),
    "expressions nested too deeply": ("{{ " + "(" * 9_000 + "1" + ")" * 9_000 + " }}", "Recursion"),
    "a cycle of nothing": ("a\n{{ cycler() }}", "line 2"),
    "an assertion of Jinja's": ("\n{{ ('a' * 99) | truncate(-5) }}", "line 2"),
    "a number where a mapping belongs": ("{{ 5 | xmlattr }}", "line 1"),
    "a block of another file": ("{% include 'x' %}", "line 1"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}\n\n{{ f() }}", "line"),
    "a huge text": ("\n{{ 'x' * 3000000000 }}", "512 MB"),
    "a huge list": ("{{ [0] * 1000000000 }}", "512 MB"),
    "a huge width": ("{{ 'x' | center(9999999999) }}", "512 MB"),
    "a huge width in a format": ("{{ '%9999999999d' % 1 }}", "512 MB"),
    "texts that double": (
        "{% set n = namespace(a='xx') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        "512 MB",
    ),
    "a message of many lines": ("{{ raise_exception('one\ntwo\nthree') }}", "one two three"),
    "a message without end": ("{{ raise_exception('x' * 100000) }}", "xxx"),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_whatever_a_template_does_ends_in_one_line_that_names_its_source(kind: str) -> None:
    template, said = FAULTY[kind]
    with pytest.raises(InputError) as caught:
        render_chat(template, CHATS[0], {}, origin="some/folder")
    assert caught.value.message.startswith("some/folder: the chat template ")
    assert said in caught.value.message
    assert len(caught.value.message.splitlines()) == 1
    assert len(caught.value.message) < 500


def test_half_a_surrogate_pair_that_a_template_writes_is_a_replacement_character() -> None:
    assert render_chat("{{ '\\ud800' }}{{ messages[0].content }}", [{"content": "é"}], {}) == "\ufffdé"


def test_a_template_that_writes_without_end_is_stopped_where_the_context_is_full() -> None:
    template = "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}"
    with pytest.raises(PromptTooLongError, match="1,000 characters"):
        render_chat(template, CHATS[0], {}, most=1_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 8) }}",
    ],
    ids=["loops", "one step"],
)
def test_a_template_that_does_not_end_is_ended_and_the_next_is_filled(template: str) -> None:
    with pytest.raises(InputError, match="takes more than 2 s"):
        render_chat(template, CHATS[0], {})
    assert render_chat("{{ messages[0].content }}", CHATS[0], {}) == CHATS[0][0]["content"]


def test_templates_outlive_the_death_of_their_process_and_a_ctrl_c() -> None:
    """The answer to an abandoned question never becomes that to the next one."""
    fill = "{{ messages[0].content }}"
    assert render_chat(fill, [{"role": "user", "content": "one"}], {}) == "one"
    worker = templates._PROCESS._worker
    assert worker is not None
    os.kill(worker.pid, signal.SIGKILL)
    while worker.running:
        time.sleep(0.001)
    assert render_chat(fill, [{"role": "user", "content": "two"}], {}) == "two"
    worker = templates._PROCESS._worker
    assert worker is not None

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smolctl.worker.pickle.load", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render_chat(fill, [{"role": "user", "content": "three"}], {})
    assert render_chat(fill, [{"role": "user", "content": "four"}], {}) == "four"


@pytest.mark.real_weights
def test_the_template_of_smollm2_needs_no_process(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = load_tokenizer(str(gguf_file)).chat_template
    assert template is not None
    monkeypatch.setattr(templates, "_PROCESS", None)
    assert "<|im_start|>" in render_chat(template, CHATS[0], {})
