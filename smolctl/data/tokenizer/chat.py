"""A conversation as the text that a chat model was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from smolctl.errors import InputError, PromptTooLongError
from smolctl.escaping import whole_characters
from smolctl.templates import MOST_CHARACTERS, filled, with_limits

_ANSWER_MARK = "answer_mark"  # the variable that `{% generation %}` writes
# SHA-256 of templates that were read and found harmless. They need no process, which takes 0.1 s to start.
HARMLESS = frozenset({
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",  # SmolLM2-Instruct
    "66edfb854931c933d3ac94f507626dd4fa2d5ca0a9b1036b11729d296a7392ac",  # smolctl's ChatML
})  # fmt: skip
Messages = Sequence[Mapping[str, Any]]


def render_chat(
    template: str,
    messages: Messages,
    tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
    origin: str = "the model",
    most: int = MOST_CHARACTERS,
    tools: Messages = (),
    answer_mark: str = "",
) -> str:
    """Render a model's chat template.

    Args:
        template: Jinja source, as in tokenizer_config.json or a GGUF.
        messages: `{"role": ..., "content": ...}` each.
        tokens: special tokens under the names that templates use, such as bos_token.
        add_generation_prompt: end with the header of the assistant's turn.
        origin: of the template, for error messages.
        most: maximum characters of the text.
        tools: functions that the assistant may call, in the template's form.
        answer_mark: written before and after the text of every `{% generation %}` block.

    Raises:
        InputError: the template is broken, refuses these messages, or needs too much time or memory.
        PromptTooLongError: the text is longer than `most`.
    """
    harmless = hashlib.sha256(template.encode("utf-8", "replace")).hexdigest() in HARMLESS
    asked = template, messages, tokens, add_generation_prompt, most, tools, answer_mark
    text, fault = fill(*asked) if harmless else with_limits(fill, *asked)
    if fault:
        raise InputError(
            f"{origin}: the chat template {fault}",
            "Change the messages, or leave out --chat to complete plain text.",
        )
    text = whole_characters(text)  # messages and template may contain surrogates
    if len(text) > most:
        raise PromptTooLongError(f"the conversation has more than {most:,} characters", "Shorten it.")
    return text


def fill(
    template: str,
    messages: Messages,
    tokens: Mapping[str, str],
    add_generation_prompt: bool,
    most: int,
    tools: Messages = (),
    answer_mark: str = "",
) -> tuple[str, str]:
    """The text of a chat template, and what is wrong with it; see `filled`."""
    variables = {
        "messages": [dict(message) for message in messages],
        **{"bos_token": "", "eos_token": "", **tokens},
        "add_generation_prompt": add_generation_prompt,
        "tools": [dict(tool) for tool in tools] or None,
        _ANSWER_MARK: answer_mark,
        "documents": None,
    }
    return filled(lambda: _compiled(template), variables, most)


@lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    """A compiled template, because compiling takes a hundred times longer than rendering."""
    return _environment().from_string(template)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=lambda *pairs, **items: dict(*pairs, **items),  # the class itself gives access to more
        namespace=_Namespace,
    )
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` encloses the assistant's text: outputs its content, between two marks if there
    are any.
    """

    tags = {"generation"}  # noqa: RUF012 (the name and type that Jinja asks for)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        content = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = jinja2.nodes.Output([jinja2.nodes.Name(_ANSWER_MARK, "load")], lineno=line)
        return [mark, *content, mark]


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that start with an underscore, which would give access to Python's
    internals.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            _raise(f"a namespace does not accept a name like {name!r}")
        super().__setitem__(name, value)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, this one does not escape <, > and &."""
    return json.dumps(  # noqa: TID251 - as transformers has it in its templates
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
