"""A model's chat template for the page: as texts between messages, if that is all it does.

A template is a program. The templates of most models write the same text between two messages whatever the
messages contain. These texts are found by rendering the template with marks, and verified with many
conversations; templates that fail the verification are rendered in the page by a Jinja library.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import jinja2

from smolctl.data.tokenizer.chat import render_chat
from smolctl.data.tokenizer.prompt import is_control
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError
from smolctl.page.jinja import jinja_files
from smolctl.sources import ModelSource

Message = dict[str, str]
# In addition to the roles of messages: before the first message and after the last one.
START, ANSWER = "start", "answer"
# A template that calls it depends on the date.
_CLOCK = "strftime_now"
# Contents that a template may treat specially, in addition to the texts in the template itself.
_CONTENTS = [
    "", " ", "a", "Hello, how are you?", "  two spaces around  ", "\n\nlines\n\n", "\r\nx\r\n", "0", "None",
    "\t\x1c\x85\xa0\u3000x\u2003", "\ufeffmarked\ufeff", "\u200bx\u200b", "naïve 界面 🎉👩‍👩‍👧 e\u0301",
    "{{ 7 * 7 }} {% if %} {# #}", "<b>&amp;</b> \"quoted\" 'so' \\n", "def f(x):\n    return x\n",
    "<think>\nfirst\n</think>\n\nthen", "[INST] x [/INST]", "<tool_call>{}</tool_call>", "x" * 2_000,
]  # fmt: skip
_ROUNDS = 60  # conversations with random contents


def page_chat(source: ModelSource) -> dict[str, Any] | None:
    """`chat` of page.json; None if the model has no chat template.

    "system" is the system message that the template adds by default, if known; "takes_system" says whether it
    accepts one.

    Raises:
        InputError: the template is broken, or refuses a question.
    """
    tokenizer = Tokenizer.from_files(source.require_tokenizer(), source.id)
    if tokenizer.chat_template is None:
        return None
    render(tokenizer, conversation(["a"]))
    takes_system = accepts_system(tokenizer)
    pieces = chat_pieces(tokenizer, takes_system)
    if pieces is not None:
        system = _default_system(pieces["between"])
        return {"kind": "pieces", "takes_system": takes_system, "system": system, **pieces}
    example = conversation(["Hello, how are you?", "Fine.\n\n1 < 2", " And you? "])
    return {
        "kind": "jinja",
        "takes_system": takes_system,
        "system": None,
        "template": tokenizer.chat_template,
        "tokens": {"bos_token": "", "eos_token": "", **tokenizer.named_tokens},
        # The expected output of the library, unless it depends on the date.
        "example": None
        if _CLOCK in tokenizer.chat_template
        else {"messages": example, "text": render(tokenizer, example)},
    }


def chat_files(chat: Mapping[str, Any] | None) -> Mapping[str, bytes]:
    """The files that the page needs for a `page_chat`, by name. Raises as `jinja_files`."""
    return jinja_files() if chat is not None and chat["kind"] == "jinja" else {}


def accepts_system(tokenizer: Tokenizer) -> bool:
    """Whether a system message is accepted and changes the output."""
    try:
        return render(tokenizer, conversation(["a"], "b")) != render(tokenizer, conversation(["a"]))
    except InputError:
        return False


def chat_pieces(tokenizer: Tokenizer, takes_system: bool = True) -> dict[str, Any] | None:
    """The texts of the template between messages: after an optional system message, alternating questions and
    answers, and a last question. None if the template does more than that.

    Keys: "between": role to role to text, with START and ANSWER for the ends; "strip": roles whose contents
    are stripped of whitespace.
    """
    template = tokenizer.chat_template or ""
    if _CLOCK in template:
        return None
    between: dict[str, dict[str, str]] = {}
    strip: set[str] = set()
    systems = (None, " \n\x1csystem ") if takes_system else (None,)
    try:
        for system in systems:
            messages = conversation([" \n\x1cquestion1 ", " \n\x1canswer ", " \n\x1cquestion2 "], system)
            text, before = render(tokenizer, messages), START
            for message in messages:
                content = message["content"]
                if content not in text:
                    strip.add(message["role"])
                piece, content, text = text.partition(content if content in text else content.strip())
                between.setdefault(before, {})[message["role"]] = piece
                before = message["role"]
            between.setdefault(before, {})[ANSWER] = text
        pieces = {"between": between, "strip": sorted(strip)}
        added = tokenizer.backend.get_added_tokens_decoder().values()
        control = [token.content for token in added if is_control(token)][:8]
        for messages in conversations([*_CONTENTS, *control, *_literals(template)], takes_system):
            hidden = tokenizer.spelled.hide(messages)
            if render(tokenizer, hidden) != join(pieces, hidden):
                return None
    except InputError:  # it refuses these messages
        return None
    return pieces


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """Render the template with messages, up to the start of the answer. Raises as `render_chat`."""
    return render_chat(tokenizer.chat_template or "", messages, tokenizer.named_tokens)


def join(pieces: Mapping[str, Any], messages: Sequence[Message]) -> str:
    """The output of chat.js."""
    text = ""
    for before, message in pairwise([{"role": START}, *messages, {"role": ANSWER, "content": ""}]):
        content = message["content"]
        text += pieces["between"][before["role"]][message["role"]]
        text += content.strip() if message["role"] in pieces["strip"] else content
    return text


def conversation(contents: Sequence[str], system: str | None = None) -> list[Message]:
    """Alternating messages of a user and an assistant, after an optional system message."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return [*first, *({"role": roles[number % 2], "content": one} for number, one in enumerate(contents))]


def conversations(contents: Sequence[str], takes_system: bool) -> Iterator[list[Message]]:
    """Conversations for the verification: every content in every role, then random contents, then very
    many turns.
    """
    for content in contents:
        yield conversation([content])
        yield conversation(["a", content, content])
        if takes_system:
            yield conversation(["a"], content)
            yield conversation([content] * 3, content)
    chance = random.Random(0)
    for _ in range(_ROUNDS):
        system = chance.choice([None, chance.choice(contents)]) if takes_system else None
        yield conversation(chance.choices(contents, k=chance.randrange(1, 16, 2)), system)
    yield conversation(chance.choices(contents, k=101))


def _literals(template: str) -> list[str]:
    """Texts in a template, also as parts of other texts, because the template may search for them in
    messages.
    """
    found = {value[1:-1] for _, kind, value in jinja2.Environment().lex(template) if kind == "string"}
    decoded = [one.encode("ascii", "backslashreplace").decode("unicode-escape") for one in sorted(found)]
    return [around + one + around for one in decoded for around in ("", " x ")]


def _default_system(between: Mapping[str, Mapping[str, str]]) -> str | None:
    """The system message that a template adds if there is none."""
    begin, end = between[START].get("system"), between.get("system", {}).get("user")
    without = between[START]["user"]
    if begin is None or end is None or not (without.startswith(begin) and without.endswith(end)):
        return None
    return without[len(begin) : len(without) - len(end)] or None
