"""Prompts have the ids that transformers gives them, and a message never becomes control tokens."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from smolctl.data.tokenizer.text_encoder import TextEncoder
from smolctl.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from smolctl.errors import InputError
from tests.support.tiny_models import tiny_tokenizer
from tests.support.tokenizers import MAKERS, tokenizer

TEXTS = ("", "The old clock.", " a\n\n b  c", "Größe 界面", "long hill cats! [old] twice\n every")
# Of these every tokenizer has some.
KNOWN = ("<|endoftext|>", "<s>", "</s>", "[CLS]", "[SEP]", "<unk>", "[UNK]")
PARTS = st.sampled_from([*KNOWN, "<", "s>", "</s", "|>", "[SE", "P]", "a", " ", "\n", "é"])


def template(kind: str) -> str:
    """Turns with special tokens of the tokenizer around them, and BOS at the beginning of them all."""
    added = tokenizer(kind).get_added_tokens_decoder().values()
    mark = [token.content for token in added if token.special][-1]
    turns = "{% for m in messages %}MARK{{ m.role }}: {{ m['content'] | trim }}MARK\n{% endfor %}"
    answer = "{% if add_generation_prompt %}MARKassistant: {% endif %}"
    return "{{ bos_token }}" + (turns + answer).replace("MARK", mark)


@cache
def pair(kind: str) -> tuple[Tokenizer, Any]:
    """A tokenizer as we load it and as transformers does."""
    from transformers import AutoTokenizer

    first = min(i for i, token in tokenizer(kind).get_added_tokens_decoder().items() if token.special)
    with TemporaryDirectory() as folder:
        Tokenizer(tokenizer(kind), template(kind), first, first).save(Path(folder))
        return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def theirs_of(kind: str, messages: list[dict[str, str]]) -> list[int]:
    ids = pair(kind)[1].apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return [int(token) for token in ids]


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_raw_prompt_has_the_ids_of_transformers(kind: str) -> None:
    ours, theirs = pair(kind)
    for text in (*TEXTS, *KNOWN, "a <s>b</s> <|endoftext|>[SEP]"):
        expected = theirs(text)["input_ids"] or [ours.bos_token_id]
        assert list(ours.prompt(text).ids) == expected, text
        assert ours.encode_batch([text]) == [theirs(text)["input_ids"]]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_chat_has_the_ids_of_transformers_and_begins_once(kind: str) -> None:
    ours, _ = pair(kind)
    for contents in (TEXTS[1:2], TEXTS[:3], TEXTS):
        prompt = ours.chat_prompt(chat(*contents))
        assert list(prompt.ids) == theirs_of(kind, chat(*contents))
    meant = chat("a " + " ".join(KNOWN), "b")
    assert list(ours.chat_prompt(meant, "tokens").ids) == theirs_of(kind, meant)
    assert ours.chat_prompt(meant).text == ours.chat_prompt(meant, "tokens").text


@pytest.mark.parametrize("kind", MAKERS)
@given(parts=st.lists(PARTS, max_size=8))
def test_no_message_becomes_control_tokens(kind: str, parts: list[str]) -> None:
    text = "".join(parts)
    assert control_tokens(kind, "user", text) == control_tokens(kind, "user", "x")
    assert control_tokens(kind, text, "x") == control_tokens(kind, "user", "x")


@cache
def control_tokens(kind: str, role: str, text: str) -> list[int]:
    """Those that a tokenizer puts into a conversation which says a text in each of its messages."""
    ours, _ = pair(kind)
    added = ours.backend.get_added_tokens_decoder().items()
    special = {i for i, token in added if token.special and token.content not in ("<unk>", "[UNK]")}
    messages = [{"role": role, "content": text}, *chat(text)]
    prompt = ours.chat_prompt(messages)
    assert prompt.text == ours.chat_prompt(messages, "tokens").text
    return [token for token in prompt.ids if token in special]


def test_control_tokens_that_are_not_marked_as_special_stay_out_of_messages_too() -> None:
    backend = Tokenizer(tokenizer("smollm")).backend.from_str(tokenizer("smollm").to_str())
    names = ["<|turn|>", "[EOT]", "<think>"]
    backend.add_tokens([AddedToken(name, normalized=True) for name in names])
    turn, end, think = (backend.token_to_id(name) for name in names)
    ours = Tokenizer(backend, "{% for m in messages %}<|turn|>{{ m.content }}[EOT]{% endfor %}")
    text = "a " + " ".join(names)
    ids = ours.chat_prompt(chat(text)).ids
    assert [token for token in ids if token in (turn, end, think)] == [turn, think, end]
    assert ours.decode(ids, skip_special=False) == f"<|turn|>{text}[EOT]"


@pytest.mark.parametrize("kind", ["smollm", "gpt2", "gpt4", "joining", "llama", "t5", "words"])
def test_spelled_tokens_are_read_as_training_reads_them(kind: str) -> None:
    special = tokenizer(kind).get_added_tokens_decoder()
    mark_id, mark = next((token_id, token.content) for token_id, token in special.items() if token.special)
    ours = Tokenizer(tokenizer(kind), mark + "{% for m in messages %}{{ m.content }}" + mark + "{% endfor %}")
    for text in ("the hill", "b " + " ".join(token.content for token in special.values()) + " a"):
        encoder = TextEncoder(Tokenizer(tokenizer(kind), eos_token_id=0))
        (ids,) = encoder.encode(list(encoder.pieces([text])))
        assert list(ours.chat_prompt(chat(text)).ids) == [mark_id, *ids, mark_id]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", ["llama", "llama first", "smollm"])
def test_llamas_class_reads_a_tokenizer_file_its_own_way(kind: str, legacy: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    Tokenizer(tokenizer(kind), template(kind), 1, 2).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    for text in (*TEXTS, *KNOWN, "the <s> old </s>clock"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    expected = theirs.apply_chat_template(chat(*TEXTS), add_generation_prompt=True, return_dict=False)
    assert list(ours.chat_prompt(chat(*TEXTS)).ids) == expected


def test_templates_name_only_the_tokens_that_the_tokenizer_names(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    Tokenizer(tokenizer("smollm")).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "a",'
        ' "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": true}}'
    )
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 0}')
    (tmp_path / "special_tokens_map.json").write_text('{"unk_token": "<|im_start|>"}')
    named = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}"
    (tmp_path / "chat_template.jinja").write_text(named)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat("x"), tokenize=False)
    assert load_tokenizer(str(tmp_path)).chat_prompt(chat("x")).text == theirs == "|<|im_end|>|a|<|im_start|>"


def test_half_a_surrogate_pair_is_a_replacement_character_whoever_asks() -> None:
    reader = tiny_tokenizer()
    assert reader.prompt("the \ud800 cat") == reader.prompt("the \ufffd cat")
    asked = ([{"role": "user", "content": text}] for text in ("the \ud800 cat", "the \ufffd cat"))
    first, second = map(reader.chat_prompt, asked)
    assert first == second


def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(tokenizer("smollm")).chat_prompt(chat("x"))
