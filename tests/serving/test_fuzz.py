"""Every field of the API with any value: an answer, or a 4xx with a sentence; never a 500, never a hang."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolctl.data.tokenizer.chatml import CHATML
from tests.support.serving import Served, serving
from tests.support.tiny_models import write_folder

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([1e308, 5e-324, 10**99, -1, 0, 1, "", "text", "\ud800", "\x00", "<|im_end|>"])
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
TEXTS = st.text(max_size=30) | st.sampled_from(["the cat", "🎉", "\ud83c", "x" * 5_000, "<|im_start|>user"])
NUMBERS = st.integers(-2, 5) | st.floats(-1, 3) | st.sampled_from([1e-45, 1e-7, 1e6, 1e7, 1e39, 10**30])
SCHEMAS = st.recursive(
    st.sampled_from([
        *({"type": "string"}, {"type": "integer"}, {"type": "x"}, {"enum": []}, {"const": 1}, {"$ref": "#"}),
        *({"type": "string", "pattern": "("}, {"type": "string", "maxLength": 10**9}, {"not": {}}, {}),
        *({"type": "string", "pattern": "(a|a)*b"}, {"type": "number", "multipleOf": 0}, {"format": "date"}),
    ]),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["a", "b"]), inner).map(lambda own: {"properties": own}),
        inner.map(lambda items: {"type": "array", "items": items}),
        st.lists(inner, max_size=3).map(lambda many: {"anyOf": many}),
    ),
    max_leaves=6,
)  # fmt: skip
FORMATS = SCHEMAS.map(lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"])}, optional={"text": TEXTS})
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "developer", "assistant", "tool"])},
        optional={"content": TEXTS | st.lists(PARTS, max_size=3) | st.none(), "name": TEXTS},
    ),
    max_size=4,
)
IDS = st.lists(st.integers(-1, 330), max_size=20)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "best_of": NUMBERS,
    "echo": st.booleans(),
    "frequency_penalty": NUMBERS,
    "functions": ANYTHING,
    "logit_bias": ANYTHING,
    "logprobs": NUMBERS | st.booleans(),
    "max_completion_tokens": NUMBERS,
    "max_tokens": NUMBERS,
    "min_p": NUMBERS,
    "modalities": ANYTHING,
    "model": st.sampled_from(["tiny", "gpt-4"]),
    "n": NUMBERS,
    "presence_penalty": NUMBERS,
    "repetition_penalty": NUMBERS,
    "response_format": FORMATS | st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    "seed": st.integers(-(2**70), 2**70),
    "stop": TEXTS | st.lists(TEXTS, max_size=20),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": ANYTHING}),
    "suffix": TEXTS,
    "temperature": NUMBERS,
    "tool_choice": ANYTHING,
    "tools": ANYTHING,
    "top_k": NUMBERS,
    "top_logprobs": NUMBERS,
    "top_p": NUMBERS,
    "user": TEXTS,
}


def body_of(**asked: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A body in which a few fields are given, each mostly of the right type."""
    values = {name: values | ANYTHING for name, values in FIELDS.items()}
    some = st.sets(st.sampled_from(sorted(FIELDS)), max_size=5)
    fields = some.flatmap(lambda names: st.fixed_dictionaries({name: values[name] for name in names}))
    return st.builds(lambda base, more: {"max_tokens": 4} | base | more, st.fixed_dictionaries(asked), fields)


CHATS = body_of(messages=MESSAGES | ANYTHING)
COMPLETIONS = body_of(prompt=TEXTS | IDS | st.lists(TEXTS | IDS, max_size=3) | ANYTHING)
REQUESTS = st.tuples(st.just("chat/completions"), CHATS) | st.tuples(st.just("completions"), COMPLETIONS)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = write_folder(tmp_path_factory.mktemp("fuzz") / "tiny", template=CHATML, context=64)
    with serving(model) as server:
        yield server


def check(served: Served, path: str, body: dict[str, Any]) -> None:
    answer = served.client.post(f"/v1/{path}", content=json.dumps(body))
    assert answer.status_code in (200, 400, 404), (body, answer.text)
    if answer.status_code == 200:
        assert answer.headers["content-type"].startswith(("application/json", "text/event-stream"))
        # What a schema asks for may turn out to be impossible; nothing else fails once it has begun.
        assert '"error"' not in answer.text or "JSON schema" in answer.text, (body, answer.text)
        return
    error = answer.json()["error"]
    assert error["message"].endswith((".", "...")), body
    assert len(error["message"]) < 1_500
    assert error["type"] == "invalid_request_error"


@settings(max_examples=10)
@given(asked=REQUESTS)
def test_any_request_gets_an_answer_or_a_sentence(served: Served, asked: tuple[str, dict[str, Any]]) -> None:
    check(served, *asked)


@pytest.mark.proof
@settings(max_examples=10_000)
@given(asked=REQUESTS)
def test_ten_thousand_requests_get_an_answer_or_a_sentence(
    served: Served, asked: tuple[str, dict[str, Any]]
) -> None:
    check(served, *asked)
