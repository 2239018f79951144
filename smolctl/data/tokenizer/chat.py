"""A conversation as the text on which a chat model was trained.

A chat template is a program that comes with an untrusted model. Jinja's sandbox prevents access to the
interpreter, but not endless loops or excessive memory: `{{ 10 ** (10 ** 8) }}` is a single operation.
Therefore it runs in a separate process, which the operating system limits.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import signal
import threading
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from smolctl.errors import InputError, PromptTooLongError
from smolctl.escaping import whole_characters
from smolctl.worker import Worker, WorkerEndedError

MOST_CPU_S = 2  # seconds of CPU time per conversation; real templates take 0.01
MOST_MB = 512  # of memory, in addition to Python and Jinja
MOST_CHARACTERS = 10_000_000  # per conversation, if the context does not limit it further
_ANSWER_MARK = "answer_mark"  # the variable that `{% generation %}` outputs
MOST_SAID = 300  # characters of a template's own error message
# SHA-256 of templates that were reviewed and are harmless. They run without a process, which takes 0.1 s to
# start.
HARMLESS = frozenset({
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",  # SmolLM2-Instruct
    "66edfb854931c933d3ac94f507626dd4fa2d5ca0a9b1036b11729d296a7392ac",  # smolctl's ChatML
})  # fmt: skip
Messages = Sequence[Mapping[str, Any]]
Arguments = tuple[str, Messages, Mapping[str, str], bool, int, Messages, str]  # of `fill`


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
    text, fault = (fill if harmless else _PROCESS.fill)(
        template, messages, tokens, add_generation_prompt, most, tools, answer_mark
    )
    if fault:
        raise InputError(
            f"{origin}: {fault}", "Change the messages, or leave out --chat to complete plain text."
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
    """The text of a template, rendered until it is longer than `most`; and the error.

    One of the two is empty.
    """
    pieces, length = [], 0
    try:
        for piece in _compiled(template).generate(
            messages=[dict(message) for message in messages],
            **{"bos_token": "", "eos_token": "", **tokens},
            add_generation_prompt=add_generation_prompt,
            tools=[dict(tool) for tool in tools] or None,
            **{_ANSWER_MARK: answer_mark},
            documents=None,
        ):
            pieces.append(piece)
            length += len(piece)
            if length > most:
                break
        return "".join(pieces), ""
    except jinja2.TemplateSyntaxError as error:
        return "", f"the chat template is broken at line {error.lineno}: {_said(error)}"
    except SyntaxError as error:  # in the Python code that Jinja generates, which has other line numbers
        return "", f"the chat template is broken: {error.msg}"
    except MemoryError:
        return "", f"the chat template needs more than {MOST_MB} MB of memory, or is nested too deeply"
    except Exception as error:  # whatever a template raises is the template's fault
        return "", f"the chat template refuses the conversation{_place(error)}: {_said(error)}"


def fill_with_limits(*asked: *Arguments) -> tuple[str, str]:
    """`fill` in a process that the operating system ends if it takes too long.

    Windows has no such limits, and macOS has none for memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the calling process
    with contextlib.suppress(ImportError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + MOST_CPU_S)
        _limit(resource.RLIMIT_CORE, 0)
        with contextlib.suppress(OSError):  # no /proc, and on macOS no such limit
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + (MOST_MB << 20))
    return fill(*asked)


def _limit(kind: int, most: int) -> None:
    import resource

    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


class _Process:
    """The process for templates. It is started when first needed, and again after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None

    def fill(self, *asked: *Arguments) -> tuple[str, str]:
        """See `fill`."""
        with self._lock:
            if self._worker is None or not self._worker.running:
                self._worker = Worker("the chat template")
            text, fault = "", ""
            try:
                text, fault = self._worker.call(fill_with_limits, *asked)
            except WorkerEndedError as error:
                too_long = error.code == -getattr(signal, "SIGXCPU", 0)
                why = f"takes more than {MOST_CPU_S} s" if too_long else f"cannot be filled ({error.message})"
                fault = f"the chat template {why}"
            finally:
                # After Ctrl-C its answer would be taken for that to the next conversation, and if Python's
                # compiler ran out of memory, Python was found damaged.
                if not text:
                    self.end()
            return text, fault

    def end(self) -> None:
        """End the process, if there is one."""
        if self._worker is not None:
            self._worker.__exit__()
            self._worker = None


_PROCESS = _Process()
atexit.register(_PROCESS.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PROCESS.__init__)  # type: ignore[misc]


def _said(error: Exception) -> str:
    """An error's message on one short line; messages of Jinja's own errors need no class name."""
    said = " ".join(str(error)[:MOST_SAID].split())
    return said if said and isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {said}"


def _place(error: Exception) -> str:
    """The template's line that raised an error; Jinja sets the line numbers of a template's frames."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return f" at line {lines[-1]}" if lines else ""


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
