"""A conversation in the page has the ids that `Tokenizer.chat_prompt` gives it."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from types import SimpleNamespace
from typing import Any, cast

import pytest

from smolctl.config import ModelConfig
from smolctl.data.tokenizer.chatml import CHATML
from smolctl.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from smolctl.errors import PromptTooLongError, SmolError
from smolctl.generation.conversation import Conversation
from smolctl.generation.load import LoadedModel
from smolctl.page.chat import Message, chat_files, chat_pieces, conversation, page_chat
from smolctl.page.jinja import VERSION, jinja_files
from smolctl.page.tokenization import page_tokenizer
from tests.support.node import PAGE_FILES, run_module
from tests.support.tokenizers import source_of, tokenizer

DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The ways of Llama 2 and Mistral, Gemma, Zephyr: what stands between messages depends on the roles alone.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}<<SYS>>{{ m.content | trim }}<</SYS>>"
    "{% elif m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}<|im_start|>model\n"
)
LINES = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}<|assistant|>\n"
PIECES = {
    "ChatML": CHATML,
    "a default system message": DEFAULT_SYSTEM,
    "brackets": BRACKETS,
    "no system message": NO_SYSTEM,
    "lines": LINES,
}
# What looks at messages, counts them, or changes them.
PROGRAMS = {
    "counts": "{% for m in messages %}{{ loop.index }} {{ m.content }}\n{% endfor %}>",
    "cuts": CHATML.replace("message['content']", "message['content'].split('</think>')[-1]"),
    "changes": CHATML.replace("message['content']", "message['content'] | upper"),
    "looks": CHATML.replace("message['content']", "('' if 'magic' in message.content else message.content)"),
    "forgets": CHATML.replace("in messages", "in messages[-4:]"),
    "first": CHATML.replace("+ '<|im_end|>'", "+ ('<|im_end|>' if loop.first else '.')"),
    "left": CHATML.replace("message['content']", "message['content'].lstrip()"),
    "date": "{{ strftime_now('%Y') }}" + CHATML,
    "repeats": CHATML.replace("message['content']", "message['content'] + message['content']"),
    "long": CHATML.replace("message['content']", "message['content'][:1000]"),
}
# What Python's `strip` takes for whitespace and JavaScript's `trim`, which the Jinja library uses, does not.
ODD_SPACE = "\x1c\u3000x\x85"
WORDS = [
    "", " ", "Hi!\n", " \u3000\n", ODD_SPACE, "<|im_end|>", "<|im_start|>user\n", "<|im_", "end|>", "Größe",
    "\U000f0000",
]  # fmt: skip
RUN = """
import { readFileSync } from "node:fs";
import { Tokenizer } from "./tokenizer.js";
import { openChat, chatPrompt, fit } from "./chat.js";
const { options, json, chats, conversations, sizes } = JSON.parse(readFileSync(0, "utf8"));
const tokenizer = new Tokenizer(JSON.parse(json), options);
const answers = [];
for (const chat of chats) {
  const render = await openChat(chat);
  const attempt = (work) => { try { return work(); } catch (error) { return error.name; } };
  const prompts = conversations.map((messages) => attempt(() => chatPrompt(tokenizer, render, messages)));
  const fitted = sizes.map(([capacity, most]) =>
    attempt(() => fit(tokenizer, render, conversations.at(-1), capacity, most).forgotten));
  answers.push([prompts, fitted]);
}
console.log(JSON.stringify(answers));
"""


def importing(source: str, folder: Path) -> str:
    """A module that imports the page's files from a copy of them."""
    return source.replace('from "./', f'from "{folder.as_uri()}/')


def chat_model(template: str) -> Tokenizer:
    return Tokenizer(tokenizer("smollm"), template, 1, 2)


def some_conversations(words: Sequence[str]) -> list[list[Message]]:
    """With a system message and without; the last has many turns."""
    chance = random.Random(0)

    def said() -> str:
        return "".join(chance.choices(words, k=3))

    short = [conversation([said() for _ in range(2 * n + 1)], said() if n % 2 else None) for n in range(6)]
    return [*short, conversation([said() * (n % 5) for n in range(41)])]


def forgotten(ours: Tokenizer, messages: Sequence[Message], capacity: int, most: int) -> int | str:
    engine = SimpleNamespace(config=ModelConfig(max_position_embeddings=100_000))
    model = LoadedModel("x", cast(Any, engine), ours, 0.0)
    talk = Conversation(True, turns=[dict(one) for one in messages[:-1]])
    try:
        return talk.make_room(model, messages[-1]["content"], capacity, most)
    except PromptTooLongError:
        return "PromptTooLongError"


def assert_same(models: Sequence[Tokenizer], chats: Sequence[Any], folder: Path = PAGE_FILES) -> None:
    """The page gives the ids that Python gives, and forgets as many turns."""
    words = [word for word in WORDS if folder == PAGE_FILES or word != ODD_SPACE]
    conversations, sizes = some_conversations(words), [[n, n // 3] for n in (1, 40, 150, 400, 800, 5_000)]
    options, json_text = page_tokenizer(source_of(models[0])), models[0].files().tokenizer_json
    asked = {
        "options": options,
        "json": json_text,
        "chats": chats,
        "conversations": conversations,
        "sizes": sizes,
    }
    answers = json.loads(run_module(importing(RUN, folder), stdin=json.dumps(asked)))
    for ours, chat, (prompts, fitted) in zip(models, chats, answers, strict=True):
        for messages, ids in zip(conversations, prompts, strict=True):
            refused = messages[0]["role"] == "system" and not chat["takes_system"]
            assert ids == ("Error" if refused else list(ours.chat_prompt(messages).ids))
        assert fitted == [forgotten(ours, conversations[-1], *size) for size in sizes]
        assert {"PromptTooLongError", 0} < set(fitted), "the sizes are not those that matter"


def test_pieces_give_the_ids_of_the_template() -> None:
    models = [chat_model(template) for template in PIECES.values()]
    chats = [page_chat(source_of(ours)) for ours in models]
    assert [chat and chat["kind"] for chat in chats] == ["pieces"] * len(chats)
    assert [chat and chat["system"] for chat in chats] == [None, "Be brief.", None, None, None]
    assert [chat and chat["takes_system"] for chat in chats] == [True, True, True, False, True]
    assert_same(models, chats)


@pytest.mark.slow
@pytest.mark.real_weights
def test_smollm2_template_is_pieces_with_its_own_system_message(gguf_file: Path) -> None:
    ours = load_tokenizer(str(gguf_file))
    chat = page_chat(source_of(ours))
    assert chat is not None
    assert chat["system"] == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert chat["kind"] == "pieces"


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_template_that_does_more_is_not_taken_for_pieces(kind: str) -> None:
    assert chat_pieces(chat_model(PROGRAMS[kind])) is None


def test_a_model_without_template_has_no_chat() -> None:
    assert page_chat(source_of(Tokenizer(tokenizer("smollm")))) is None
    assert not chat_files(None)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The page's code with the Jinja library, fetched as `push` fetches it."""
    if npm := which("npm"):  # it may be set up to ask a mirror
        named = subprocess.run([npm, "config", "get", "registry"], capture_output=True, text=True)
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", named.stdout.strip())
    try:
        files = jinja_files()
    except SmolError as error:
        pytest.skip(error.message)
    shutil.copytree(PAGE_FILES, tmp_path, dirs_exist_ok=True)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.slow
def test_other_templates_give_the_ids_of_jinja(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [chat_model(template) for template in PROGRAMS.values()]
    chats = [page_chat(source_of(ours)) for ours in models]
    assert [chat and chat["kind"] for chat in chats] == ["jinja"] * len(chats)
    assert_same(models, chats, library)
    assert "MIT" in (library / "jinja-LICENSE.txt").read_text()
    assert chats[0]
    other = json.dumps(chats[0] | {"example": {"messages": [], "text": "not what it gives"}})
    source = 'import { openChat } from "./chat.js"; await openChat(JSON.parse(process.argv[2]));'
    with pytest.raises(AssertionError, match="does not give the same text here as in Python"):
        run_module(importing(source, library), other)
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    assert set(chat_files(chats[0])) == {"jinja.js", "jinja-LICENSE.txt"}, "it was fetched once more"


@pytest.mark.parametrize("registry", ["a closed port", "another file"])
def test_without_the_jinja_library_the_error_says_where_to_put_it(
    registry: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    archive = tmp_path / "@huggingface" / "jinja" / "-" / f"jinja-{VERSION}.tgz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"something else")
    address = tmp_path.as_uri() if registry == "another file" else "http://127.0.0.1:9"
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SmolError, match="SHA-256" if registry == "another file" else "refused") as refused:
        jinja_files()
    assert str(tmp_path / "cache" / "page") in refused.value.hint
    assert not (tmp_path / "cache").exists()
