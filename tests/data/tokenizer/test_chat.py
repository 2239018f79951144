"""Chat templates render as transformers renders them, and cannot do harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from smolctl.data.tokenizer.bpe import train_bpe
from smolctl.data.tokenizer.chat import render_chat
from smolctl.data.tokenizer.tokenizer import load_tokenizer
from smolctl.errors import InputError

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


def theirs(template: str, chat: list[dict[str, str]], prompt: bool) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(["a"], 300), **TOKENS)
    text = tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [TURNS, NAMESPACES], ids=["turns", "namespaces"])
def test_hand_written_templates_render_as_in_transformers(
    template: str, chat: list[dict[str, str]], prompt: bool
) -> None:
    assert render_chat(template, chat, TOKENS, prompt) == theirs(template, chat, prompt)


@pytest.mark.real_weights
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
def test_smollm2_template_renders_as_in_transformers(
    gguf_file: Path, chat: list[dict[str, str]], prompt: bool
) -> None:
    tokenizer = load_tokenizer(str(gguf_file))
    template = tokenizer.chat_template
    assert template is not None
    rendered = render_chat(template, chat, tokenizer.named_tokens, prompt)
    assert rendered == theirs(template, chat, prompt)
    assert chat[-1]["content"] in rendered


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
