"""A conversation as the text that a chat model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from smolctl.errors import InputError


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
) -> str:
    """Fill a model's chat template.

    Templates come with models from anywhere: they run in a sandbox that cannot change what it is
    given nor reach the interpreter.

    Args:
        template: Jinja source, as in tokenizer_config.json or a GGUF.
        messages: `{"role": ..., "content": ...}` each.
        tokens: special tokens by the names that templates know them by, such as bos_token.
        add_generation_prompt: end with the header of the assistant's turn.

    Raises:
        InputError: the template is broken, or refuses these messages.
    """
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=[dict(message) for message in messages],
                **{"bos_token": "", "eos_token": "", **tokens},
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )
        )
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"the model's chat template is broken at line {error.lineno}: {error.message}",
            "Leave out --chat to complete plain text.",
        ) from None
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        RecursionError,
    ) as error:
        raise InputError(
            f"the model's chat template refuses the conversation: {error}",
            "Change the messages, or leave out --chat to complete plain text.",
        ) from None


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=lambda *pairs, **items: dict(*pairs, **items),  # the class itself has more to reach for
        namespace=_Namespace,
    )
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (the name and type that Jinja asks for)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore: none of Python's inner ones."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            _raise(f"a namespace takes no name like {name!r}")
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
    """Unlike Jinja's own filter this one leaves <, > and & alone."""
    return json.dumps(  # noqa: TID251 - as transformers has it in its templates
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
